#pragma once
// tokenizer.json pre-tokenizers: a text is cut into words; the model then works on each word by itself.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "field.h"

namespace moegraft::tokenizer {

// Words as ranges of one buffer. at_start: the word begins where the whole input text began (Metaspace's prepend_scheme
// "first").
struct Words {
  struct Range {
    size_t begin, end;
    bool at_start;
  };
  std::string text;
  std::vector<Range> ranges;
  size_t limit = 0;  // what `text` may grow to (growth_limit)

  std::string_view view(const Range& r) const { return std::string_view(text).substr(r.begin, r.end - r.begin); }
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(Words& words) const = 0;
};

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Field& field);

}  // namespace moegraft::tokenizer
