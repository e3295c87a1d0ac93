#pragma once
// YAML -> typed structs, strict. A config struct lives beside its owner and lists its fields once; that list drives
// parsing, defaults, dump and docs:
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
// Field types: bool, int64_t, double, std::string, enums with a table of names (choices.h), std::vector<T>,
// std::map<std::string, T>, std::optional<T>, and structs with visit_fields. A struct of several kinds gives tag(), a
// reference to the enum field that its other fields depend on: visit_fields visits that field, what all kinds have, and
// what this one has. A field without default: wrap in config::required(...). Rules of the format: src/config/README.md.
// All errors are UsageError, one line with the key's path.
//
//   auto config = config::parse<RunConfig>(config::Document::from_file(path, overrides));
//   io::write_file_atomic(dir / "config.yaml", config::dump(config));   // parses back to the same values;
//   parse_stored, when keys have moved since std::cout << config::to_yaml(config::describe<RunConfig>());        //
//   every key with type, range, default and meaning: a file to start from

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/config/choices.h"  // IWYU pragma: export
#include "moegraft/config/keys.h"     // IWYU pragma: export

namespace moegraft::config {

// A path as a shell reads it: ~ at its start, $NAME and ${NAME} anywhere. Logs what it becomes, where it changes.
// UsageError names `key` and a variable that is not set.
std::string expand_path(const std::string& path, const std::string& key);

// What a value must satisfy besides its type.
struct Constraint {
  double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();
  std::vector<std::string> choices;
  bool required = false;
  bool path = false;  // of a file or folder: expand_path where it is read
};
inline Constraint any() { return {}; }
inline Constraint range(double min, double max) { return {min, max, {}, false}; }
inline Constraint one_of(std::vector<std::string> choices) {
  return {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity(), std::move(choices), false};
}
inline Constraint required(Constraint c = {}) {
  c.required = true;
  return c;
}
inline Constraint path() {
  Constraint c;
  c.path = true;
  return c;
}

// A parsed YAML value. Keeps yaml-cpp out of this header and every duplicate key and quoted scalar visible to the
// checks.
struct TreeEntry;
struct Tree {
  enum class Kind { null, scalar, list, map };
  Kind kind = Kind::null;
  std::string text;                // scalar
  bool quoted = false;             // a quoted scalar is always a string
  int64_t line = 0;                // 1-based in the file; 0: set by an override
  std::vector<TreeEntry> entries;  // list (keys empty) or map, in the order written
};
struct TreeEntry {
  std::string key;
  Tree value;
};

// A key that has gone to another place. A struct that a whole document describes lists its own: static
// std::vector<config::MovedKey> moved_keys().
struct MovedKey {
  std::string from, to;  // "train.precision", "model.dtype": names of sections and fields, no list items
  // The new key's value from the old one's and from what the document has at the new place ("": nothing); null: the old
  // value.
  std::string (*value)(const std::string& old_value, const std::string& present) = nullptr;
};

// A parsed YAML document with --set overrides applied in order ("train.steps=200", "adapters[0].rank=4", "stages=[]").
// UsageError: missing file, YAML syntax (with the line), duplicate keys, more than one document, an override that does
// not fit the document's shape.
class Document {
 public:
  static Document from_file(const std::string& path, const std::vector<std::string>& overrides = {});
  static Document from_string(const std::string& yaml, const std::vector<std::string>& overrides = {},
                              const std::string& name = "<string>");
  const Tree& root() const { return root_; }
  const std::string& name() const { return name_; }  // for messages

 private:
  Tree root_;
  std::string name_;
};

}  // namespace moegraft::config

#include "moegraft/config/visit.h"  // IWYU pragma: export   parse<T>(document), dump(value) -> YAML text, describe<T>() -> its keys
