#pragma once
// English text from Debian packages: what the quickstart's text-only base learns from.

#include <cstdint>
#include <filesystem>
#include <string>

namespace moegraft::emoji {

struct CorpusOptions {
  std::filesystem::path wordnet = "/usr/share/wordnet";  // data.noun, data.verb, data.adj, data.adv
  std::filesystem::path annotations = "/usr/share/unicode/cldr/common";
  std::string language = "en";
  std::filesystem::path
      handbook;  // folder of HTML pages (Debian: /usr/share/doc/debian-handbook/html/en-US); empty: none
  std::filesystem::path output;
  int64_t repeat_emoji = 6;  // times the emoji names and keywords come
  double eval_share = 0.01;  // of the other documents
  int64_t limit = 0;         // documents, 0: all
  uint64_t seed = 17;
};

struct CorpusSummary {
  int64_t train_documents = 0, eval_documents = 0, train_bytes = 0, eval_bytes = 0;
};

// Writes <output>/train.txt and eval.txt: lower-cased, one document a line, shuffled. A WordNet document is "word,
// word: gloss; "example"", an emoji one "name: keyword, keyword" with the keywords in another order each time. Held-out
// names are in the text; held out are pictures. Deterministic in the options. UserError: a missing or malformed source.
CorpusSummary prepare_corpus(const CorpusOptions& options);

}  // namespace moegraft::emoji
