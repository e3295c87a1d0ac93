#pragma once
// The keys of a config as data, and the two texts made of them. Include config.h, not this file.

#include <limits>
#include <string>
#include <vector>

namespace moegraft::config {

struct Choice {
  std::string name, meaning;  // meaning: empty where the key's own says it all
};

struct Key {
  std::string path;  // "train.lora.lr", "adapters[].rank"; what names a mapping's entry is <name>
  std::string type;  // "integer", "list of paths", "section"
  double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();
  std::vector<Choice> choices;
  std::string default_text;  // YAML on one line; empty for sections
  std::string meaning;
  bool required = false;
  bool in_entry =
      false;  // of a list's, a mapping's or an optional section's entry: no such key where there is no entry
};

// One table for the keys of the top level, then a heading "### section" and a table for each section.
std::string to_markdown(const std::vector<Key>& keys);

// A file to start from: every key at its default under a comment that says what it is. Required keys are left empty,
// entries of lists, mappings and optional sections are commented out. With the required keys filled in it parses to the
// defaults.
std::string to_yaml(const std::vector<Key>& keys);

}  // namespace moegraft::config
