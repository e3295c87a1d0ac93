// Typed reading of single values, and the YAML writers.

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <sstream>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/config/config.h"

namespace moegraft::config::detail {

namespace {

std::string number_text(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, value);
  return {text, end};
}

// What the user wrote, for "got ...".
std::string shown(const Cursor& at) {
  if (at.is_null()) return "null";
  switch (at.tree->kind) {
    case Tree::Kind::list: return "a list";
    case Tree::Kind::map: return "a mapping";
    default: return at.tree->quoted ? "the text \"" + at.tree->text + "\"" : at.tree->text;
  }
}

// What a single value should have been written as, where sections are wanted.
std::string as_element(const std::string& text, const std::string& first_key) {
  return first_key.empty() ? text : "{ " + first_key + ": " + text + " }";
}

// Decimal notation with exponent; the whole text or nothing.
bool parse_double(std::string text, double& value) {
  if (!text.empty() && text.front() == '+') text.erase(0, 1);
  const bool negative = !text.empty() && text.front() == '-';
  const std::string magnitude = lower_case(negative ? text.substr(1) : text);
  if (magnitude == ".inf") {
    value = negative ? -INFINITY : INFINITY;
    return true;
  }
  // from_chars also reads "inf", "nan" and "nan(...)", which YAML spells otherwise.
  if (magnitude.empty() || !(std::isdigit(static_cast<unsigned char>(magnitude[0])) || magnitude[0] == '.'))
    return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

void check_range(const Cursor& at, double value, const Constraint& c) {
  if (!(value >= c.min && value <= c.max)) at.fail("must be in " + range_text(c.min, c.max) + ", got " + shown(at));
}

// Text that any YAML reader takes as the same string without quotes.
bool plain_is_safe(const std::string& text) {
  if (text.empty() || !(std::isalpha(static_cast<unsigned char>(text[0])) || text[0] == '/' || text[0] == '_'))
    return false;
  for (const unsigned char c : text)
    if (!std::isalnum(c) && std::string_view("_./@+-").find(static_cast<char>(c)) == std::string_view::npos)
      return false;
  const std::string lower = lower_case(text);
  for (const char* word : {"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
    if (lower == word) return false;
  return true;
}

std::string quote(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (c == '\n')
      out += "\\n";
    else if (c == '\t')
      out += "\\t";
    else if (byte < 0x20 || byte == 0x7f)
      out += {'\\', 'x', "0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    else
      out += c;
  }
  return out + "\"";
}

std::string scalar_text(const std::string& text, bool quoted) { return quoted ? quote(text) : text; }
std::string key_text(const std::string& key) { return scalar_text(key, !plain_is_safe(key)); }

bool is_leaf(const Tree& tree) {
  // Lists of scalars stay on one line.
  return tree.entries.empty() || (tree.kind == Tree::Kind::list &&
                                  std::all_of(tree.entries.begin(), tree.entries.end(),
                                              [](const TreeEntry& entry) { return entry.value.entries.empty(); }));
}

void write_block(const Tree& tree, size_t indent, bool first_inline, std::string& out) {
  for (size_t i = 0; i < tree.entries.size(); ++i) {
    const auto& [key, value] = tree.entries[i];
    if (i > 0 || !first_inline) out.append(indent, ' ');
    if (tree.kind == Tree::Kind::map) {
      out += key_text(key) + ":";
      if (is_leaf(value)) {
        out += " " + to_flow(value) + "\n";
      } else {
        out += "\n";
        write_block(value, indent + 2, false, out);
      }
    } else {
      out += "- ";
      if (is_leaf(value))
        out += to_flow(value) + "\n";
      else
        write_block(value, indent + 2, true, out);
    }
  }
}

}  // namespace

std::string range_text(double min, double max) {
  return std::isfinite(min) || std::isfinite(max) ? "[" + number_text(min) + ", " + number_text(max) + "]" : "";
}

std::string join_path(const std::string& path, const std::string& key) { return path.empty() ? key : path + "." + key; }

Cursor Cursor::child(const std::string& key) const {
  const Tree* found = nullptr;
  if (tree != nullptr)
    for (const auto& entry : tree->entries)
      if (entry.key == key) found = &entry.value;
  return {found, join_path(path, key), source};
}

Cursor Cursor::item(size_t index) const {
  return {&tree->entries[index].value, path + "[" + std::to_string(index) + "]", source};
}

void Cursor::fail(const std::string& message) const {
  std::string where = source;
  if (tree != nullptr) where = tree->line > 0 ? source + ":" + std::to_string(tree->line) : "set by --set";
  moegraft::fail<UsageError>(path.empty() ? "the config" : path, " ", message, " (", where, ")");
}

bool read_bool(const Cursor& at) {
  if (!at.is_null() && at.tree->kind == Tree::Kind::scalar && !at.tree->quoted) {
    const std::string& text = at.tree->text;
    if (text == "true" || text == "True" || text == "TRUE") return true;
    if (text == "false" || text == "False" || text == "FALSE") return false;
  }
  at.fail("must be true or false, got " + shown(at));
}

int64_t read_int64(const Cursor& at, const Constraint& constraint) {
  constexpr double kExact = 9007199254740992.0;  // 2^53: beyond it a double no longer names one integer
  if (at.is_null() || at.tree->kind != Tree::Kind::scalar || at.tree->quoted)
    at.fail("must be an integer, got " + shown(at));
  const std::string& text = at.tree->text;
  const char *begin = text.data() + (text[0] == '+' ? 1 : 0), *end = text.data() + text.size();
  int64_t value = 0;
  const auto [stop, error] = std::from_chars(begin, end, value);
  if (error == std::errc::result_out_of_range && stop == end) at.fail("does not fit a 64-bit integer, got " + text);
  if (error != std::errc() || stop != end) {
    double number = 0;
    if (!parse_double(text, number) || std::trunc(number) != number || !(std::abs(number) <= kExact))
      at.fail("must be an integer, got " + shown(at));
    value = static_cast<int64_t>(number);
  }
  check_range(at, static_cast<double>(value), constraint);
  return value;
}

double read_double(const Cursor& at, const Constraint& constraint) {
  double value = 0;
  if (at.is_null() || at.tree->kind != Tree::Kind::scalar || at.tree->quoted || !parse_double(at.tree->text, value))
    at.fail("must be a number, got " + shown(at));
  check_range(at, value, constraint);
  return value;
}

std::string read_string(const Cursor& at, const Constraint& constraint) {
  if (at.is_null()) at.fail("must be text, got null (write \"\" for empty text)");
  if (at.tree->kind != Tree::Kind::scalar) at.fail("must be text, got " + shown(at));
  const std::string& text = at.tree->text;
  if (constraint.required && text.empty()) at.fail("must not be empty");
  const auto& choices = constraint.choices;
  if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
    const std::string near = nearest_word(text, choices);
    at.fail("must be one of " + join(choices, ", ") + ", got " + text +
            (near.empty() || choices.size() == 1 ? "" : "; did you mean " + near + "?"));
  }
  return constraint.path ? expand_path(text, at.path) : text;
}

std::vector<Cursor> read_list(const Cursor& at, const std::string& first_key) {
  if (at.is_null()) at.fail("must be a list, got null (write [] for an empty list)");
  if (at.tree->kind != Tree::Kind::list)
    at.fail("must be a list, got " + shown(at) +
            (at.tree->kind == Tree::Kind::scalar ? " (write [" + as_element(at.tree->text, first_key) + "])" : ""));
  std::vector<Cursor> items;
  for (size_t i = 0; i < at.tree->entries.size(); ++i) items.push_back(at.item(i));
  return items;
}

std::vector<std::pair<std::string, Cursor>> read_map(const Cursor& at) {
  if (at.is_null()) at.fail("must be a mapping of names to values, got null (write {} for an empty one)");
  if (at.tree->kind != Tree::Kind::map) at.fail("must be a mapping of names to values, got " + shown(at));
  std::vector<std::pair<std::string, Cursor>> items;
  for (const auto& entry : at.tree->entries)
    items.emplace_back(entry.key, Cursor{&entry.value, join_path(at.path, entry.key), at.source});
  return items;
}

void check_keys(const Cursor& at, const std::vector<std::string>& known, const std::string& first_key) {
  if (at.is_null()) return;
  if (at.tree->kind != Tree::Kind::map) {
    const bool hint = at.tree->kind == Tree::Kind::scalar && !first_key.empty();
    at.fail("must be a mapping with the keys " + join(known, ", ") + ", got " + shown(at) +
            (hint ? " (write " + as_element(at.tree->text, first_key) + ")" : ""));
  }
  for (const auto& entry : at.tree->entries) {
    if (std::find(known.begin(), known.end(), entry.key) != known.end()) continue;
    if (entry.key == "<<") at.child(entry.key).fail("is YAML's merge, which is not read here: write its keys out");
    const std::string near = nearest_word(entry.key, known);
    at.child(entry.key).fail("is not a known key; " + (near.empty()
                                                           ? "expected one of " + join(known, ", ")
                                                           : "did you mean " + join_path(at.path, near) + "?"));
  }
}

Tree scalar_tree(bool value) { return {Tree::Kind::scalar, value ? "true" : "false", false, 0, {}}; }
Tree scalar_tree(int64_t value) { return {Tree::Kind::scalar, std::to_string(value), false, 0, {}}; }
Tree scalar_tree(double value) {
  std::string text;
  if (std::isnan(value)) {
    text = ".nan";
  } else if (std::isinf(value)) {
    text = value > 0 ? ".inf" : "-.inf";
  } else {
    text = number_text(value);  // the shortest text that reads back as the same double
    // YAML 1.1 readers take "1e-04" for text: give every number a point.
    if (text.find('.') == std::string::npos) text.insert(std::min(text.find('e'), text.size()), ".0");
  }
  return {Tree::Kind::scalar, std::move(text), false, 0, {}};
}
Tree scalar_tree(const std::string& value) { return {Tree::Kind::scalar, value, !plain_is_safe(value), 0, {}}; }

std::string to_flow(const Tree& tree) {
  if (tree.kind == Tree::Kind::null) return "null";
  if (tree.kind == Tree::Kind::scalar) return scalar_text(tree.text, tree.quoted);
  const bool is_map = tree.kind == Tree::Kind::map;
  std::string out = is_map ? "{" : "[";
  for (size_t i = 0; i < tree.entries.size(); ++i)
    out += (i ? ", " : "") + (is_map ? key_text(tree.entries[i].key) + ": " : std::string()) +
           to_flow(tree.entries[i].value);
  return out + (is_map ? "}" : "]");
}

std::string to_block(const Tree& tree) {
  if (tree.entries.empty()) return to_flow(tree) + "\n";
  std::string out;
  write_block(tree, 0, false, out);
  return out;
}

}  // namespace moegraft::config::detail
