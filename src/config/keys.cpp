// What is written of a config's keys: Markdown tables, and a YAML file to start from.

#include "moegraft/config/keys.h"

#include <algorithm>
#include <set>

#include "moegraft/base/text.h"
#include "moegraft/config/config.h"

namespace moegraft::config {
namespace {

constexpr const char* kHead = "| key | type | default | meaning |\n|---|---|---|---|\n";

std::string type_text(const Key& key, const char* quote) {
  std::vector<std::string> names;
  for (const Choice& choice : key.choices) names.push_back(quote + choice.name + quote);
  const std::string range = detail::range_text(key.min, key.max);
  return key.type + (range.empty() ? "" : " in " + range) +
         (names.empty()       ? ""
          : names.size() == 1 ? ": " + names[0]
                              : ": one of " + join(names, ", "));
}

std::string cell(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

std::string markdown_row(const Key& key) {
  std::string meaning = key.meaning;
  for (const Choice& choice : key.choices)
    if (!choice.meaning.empty()) meaning += "<br>`" + choice.name + "`: " + choice.meaning;
  const std::string standard = key.required               ? "**required**"
                               : key.default_text.empty() ? ""
                                                          : "`" + key.default_text + "`";
  return "| `" + cell(key.path) + "` | " + cell(type_text(key, "`")) + " | " + cell(standard) + " | " + cell(meaning) +
         " |\n";
}

// "adapters[].rank" -> "adapters"
std::string top_of(const std::string& path) { return path.substr(0, path.find_first_of(".[")); }

// Levels of YAML above what lies in `parent`: each name is one, each list's entry another.
size_t depth_in(const std::string& parent) {
  size_t depth = parent.empty() ? 0 : 1 + size_t(std::count(parent.begin(), parent.end(), '.'));
  for (size_t at = parent.find("[]"); at != std::string::npos; at = parent.find("[]", at + 2)) ++depth;
  return depth;
}

}  // namespace

std::string to_markdown(const std::vector<Key>& keys) {
  std::set<std::string> sections;  // keys of the top level that hold others
  for (const Key& key : keys)
    if (top_of(key.path) != key.path) sections.insert(top_of(key.path));
  std::string out;
  for (const Key& key : keys)
    if (!sections.contains(top_of(key.path))) out += (out.empty() ? kHead : "") + markdown_row(key);
  for (const Key& key : keys) {
    if (!sections.contains(top_of(key.path))) continue;
    if (key.path != top_of(key.path)) {
      out += markdown_row(key);
      continue;
    }
    out += std::string(out.empty() ? "" : "\n") + "### " + key.path + "\n\n" + key.meaning +
           (key.required ? " Required." : "") + (key.type == "section" ? "" : " (" + key.type + ")") + "\n\n" + kHead;
  }
  return out;
}

std::string to_yaml(const std::vector<Key>& keys) {
  std::string out;
  std::set<std::string> begun;  // entries
  for (const Key& key : keys) {
    const size_t dot = key.path.rfind('.');
    const std::string parent = dot == std::string::npos ? "" : key.path.substr(0, dot),
                      name = key.path.substr(dot == std::string::npos ? 0 : dot + 1);
    const auto margin = [&](size_t depth) { return (key.in_entry ? "#" : "") + std::string(2 * depth, ' '); };
    const size_t depth = depth_in(parent);
    if (parent.ends_with("[]") && begun.insert(parent).second) out += margin(depth - 1) + "-\n";
    if (parent.ends_with(".<name>") && begun.insert(parent).second) out += margin(depth - 1) + "<name>:\n";
    const bool section = key.type == "section";
    if (depth == 0 && !out.empty()) out += "\n";
    out += margin(depth) + "# " + key.meaning +
           (section ? "" : " (" + type_text(key, "") + (key.required ? ", required" : "") + ")") + "\n";
    for (const Choice& choice : key.choices)
      if (!choice.meaning.empty()) out += margin(depth) + "#   " + choice.name + ": " + choice.meaning + "\n";
    out += margin(depth) + name + ":" + (section || key.required ? "" : " " + key.default_text) + "\n";
  }
  return out;
}

}  // namespace moegraft::config
