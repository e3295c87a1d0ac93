#pragma once
// YAML -> typed structs, strict. A config struct lives beside its owner and lists its fields once; that list drives parsing, defaults, dump and docs:
//
//   struct OptimizerConfig {
//     double lr = 1e-4;
//     std::string schedule = "cosine";
//     template <class V> void visit_fields(V& v) {
//       v("lr", lr, config::range(0.0, 10.0), "Peak learning rate.");
//       v("schedule", schedule, config::one_of({"cosine", "linear", "constant"}), "Shape after warm-up.");
//     }
//     void validate(const std::string& path) const;   // optional: cross-field checks, throw UsageError
//   };
//
// Field types: bool, int64_t, double, std::string, std::vector<T>, std::map<std::string, T>, std::optional<T>, and structs with visit_fields.
// A field without default: wrap in config::required(...).

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "moegraft/base/check.h"

namespace YAML {
class Node;
}

namespace moegraft::config {

// What a value must satisfy besides its type.
struct Constraint {
  double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();
  std::vector<std::string> choices;
  bool required = false;
};
inline Constraint any() { return {}; }
inline Constraint range(double min, double max) { return {min, max, {}, false}; }
inline Constraint one_of(std::vector<std::string> choices) { return {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity(), std::move(choices), false}; }
inline Constraint required(Constraint c = {}) {
  c.required = true;
  return c;
}

// A parsed YAML document with --set overrides applied ("train.steps=200", "adapters[0].rank=4", "stages=[]").
class Document {
 public:
  static Document from_file(const std::string& path, const std::vector<std::string>& overrides = {});
  static Document from_string(const std::string& yaml, const std::vector<std::string>& overrides = {}, const std::string& name = "<string>");
  ~Document();
  Document(Document&&) noexcept;
  const YAML::Node& root() const;

 private:
  Document();
  std::unique_ptr<YAML::Node> root_;
};

}  // namespace moegraft::config

#include "moegraft/config/visit.h"  // IWYU pragma: export   parse<T>(document), dump(value) -> YAML text, describe<T>() -> docs
