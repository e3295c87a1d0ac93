#pragma once
// The visitors behind parse, dump and describe. Include config.h, not this file.

#include <algorithm>
#include <concepts>
#include <type_traits>
#include <utility>

#include "moegraft/base/text.h"
#include "moegraft/config/config.h"

namespace moegraft::config {
namespace detail {

// A place in a document: a value (null pointer: the key is absent) and what messages call it.
struct Cursor {
  const Tree* tree = nullptr;
  std::string path;    // "adapters[0].rank"; empty at the root
  std::string source;  // file name
  Cursor child(const std::string& key) const;
  Cursor item(size_t index) const;
  bool is_null() const { return tree == nullptr || tree->kind == Tree::Kind::null; }
  // Throws UsageError: "<path> <message> (<file>:<line>)".
  [[noreturn]] void fail(const std::string& message) const;
};

bool read_bool(const Cursor& at);
int64_t read_int64(const Cursor& at, const Constraint& constraint);
double read_double(const Cursor& at, const Constraint& constraint);
std::string read_string(const Cursor& at, const Constraint& constraint);
// first_key: of the sections that the list holds, for what a single value should have been written as; empty: they are
// no sections.
std::vector<Cursor> read_list(const Cursor& at, const std::string& first_key);
std::vector<std::pair<std::string, Cursor>> read_map(const Cursor& at);
void refuse_moved(const Cursor& root, const std::vector<MovedKey>& moved);
Tree migrated(Tree root, const std::vector<MovedKey>& moved);
void check_keys(const Cursor& at, const std::vector<std::string>& known, const std::string& first_key);

Tree scalar_tree(bool value);
Tree scalar_tree(int64_t value);
Tree scalar_tree(double value);
Tree scalar_tree(const std::string& value);
std::string to_block(const Tree& tree);          // YAML over several lines
std::string to_flow(const Tree& tree);           // YAML on one line
std::string range_text(double min, double max);  // "[min, max]"; empty when neither bounds
std::string join_path(const std::string& path, const std::string& key);

template <class T>
struct is_vector : std::false_type {};
template <class T>
struct is_vector<std::vector<T>> : std::true_type {};
template <class T>
struct is_map : std::false_type {};
template <class T>
struct is_map<std::map<std::string, T>> : std::true_type {};
template <class T>
struct is_optional : std::false_type {};
template <class T>
struct is_optional<std::optional<T>> : std::true_type {};

struct FieldNames {
  std::vector<std::string> names;
  template <class F>
  void operator()(const char* name, F&, const Constraint&, const char*) {
    names.push_back(name);
  }
};

template <class T>
concept Section = requires(T& value, FieldNames& names) { value.visit_fields(names); };
// A section whose tag(), an enum among its fields, decides which others it has: visit_fields visits those of the tag's
// present value.
template <class T>
concept Tagged = Section<T> && requires(T& value) { requires Choosable<std::remove_cvref_t<decltype(value.tag())>>; };
template <class T>
concept Validated = requires(const T& value) { value.validate(std::string()); };
template <class T>
concept HasMovedKeys = requires {
  { T::moved_keys() } -> std::same_as<std::vector<MovedKey>>;
};
template <class T>
concept Field =
    std::same_as<T, bool> || std::same_as<T, int64_t> || std::same_as<T, double> || std::same_as<T, std::string> ||
    Choosable<T> || is_vector<T>::value || is_map<T>::value || is_optional<T>::value || Section<T>;

// The first key of a section where that is text (what a user means by one value in the section's place), else empty.
struct FirstTextKey {
  std::string name;
  bool seen = false;
  template <class F>
  void operator()(const char* field, F&, const Constraint&, const char*) {
    if ((std::same_as<F, std::string> || Choosable<F>) && !seen) name = field;
    seen = true;
  }
};
template <class T>
std::string first_text_key() {
  FirstTextKey first;
  if constexpr (Section<T>) T{}.visit_fields(first);
  return first.name;
}

inline Constraint for_elements(Constraint constraint) {
  constraint.required = false;
  return constraint;
}

template <class T>
void read_section(const Cursor& at, T& value);

// `value` holds the defaults on entry.
template <Field T>
void read(const Cursor& at, const Constraint& constraint, T& value) {
  if constexpr (std::same_as<T, bool>) {
    value = read_bool(at);
  } else if constexpr (std::same_as<T, int64_t>) {
    value = read_int64(at, constraint);
  } else if constexpr (std::same_as<T, double>) {
    value = read_double(at, constraint);
  } else if constexpr (std::same_as<T, std::string>) {
    value = read_string(at, constraint);
  } else if constexpr (Choosable<T>) {
    Constraint named = constraint;
    for (const auto& row : choices_of(value)) named.choices.push_back(row.name);
    const std::string name = read_string(at, named);
    for (const auto& row : choices_of(value))
      if (row.name == name) value = row.value;
  } else if constexpr (is_vector<T>::value) {
    value.clear();
    for (const Cursor& item : read_list(at, first_text_key<typename T::value_type>())) {
      typename T::value_type element{};
      read(item, for_elements(constraint), element);
      value.push_back(std::move(element));
    }
  } else if constexpr (is_map<T>::value) {
    value.clear();
    for (const auto& [key, item] : read_map(at)) {
      typename T::mapped_type element{};
      read(item, for_elements(constraint), element);
      value.emplace(key, std::move(element));
    }
  } else if constexpr (is_optional<T>::value) {
    if (at.is_null()) {
      if (constraint.required) at.fail("is required, got null");
      value.reset();
      return;
    }
    typename T::value_type inner = value.value_or(typename T::value_type{});
    read(at, constraint, inner);
    value = std::move(inner);
  } else {
    read_section(at, value);
  }
}

struct FieldReader {
  const Cursor& at;
  template <class F>
  void operator()(const char* name, F& field, const Constraint& constraint, const char* doc) {
    const Cursor child = at.child(name);
    if (child.tree != nullptr) {
      read(child, constraint, field);
    } else if (constraint.required) {
      child.fail(std::string("is required: ") + doc);
    } else if constexpr (Section<F>) {
      read_section(child, field);  // an absent section may still hold a required key, and its defaults are validated
    }
  }
};

// Reads the one field that lies at `tag`.
struct TagReader {
  const Cursor& at;
  const void* tag;
  template <class F>
  void operator()(const char* name, F& field, const Constraint& constraint, const char*) {
    if (const Cursor child = at.child(name); &field == tag && child.tree != nullptr) read(child, constraint, field);
  }
};

template <class T>
void read_section(const Cursor& at, T& value) {
  if constexpr (Tagged<T>) {
    TagReader tag{at, &value.tag()};
    value.visit_fields(tag);
  }
  // Unknown keys first: a misspelt required key is better reported as a typo than as missing.
  FieldNames known;
  value.visit_fields(known);
  check_keys(at, known.names, first_text_key<T>());
  FieldReader reader{at};
  value.visit_fields(reader);
  if constexpr (Validated<T>) std::as_const(value).validate(at.path);
}

template <Field T>
Tree to_tree(T& value);

struct FieldWriter {
  Tree& map;
  template <class F>
  void operator()(const char* name, F& field, const Constraint&, const char*) {
    map.entries.push_back({name, to_tree(field)});
  }
};

template <Field T>
Tree to_tree(T& value) {
  Tree tree;
  if constexpr (is_vector<T>::value) {
    tree.kind = Tree::Kind::list;
    for (typename T::value_type element : value) tree.entries.push_back({"", to_tree(element)});
  } else if constexpr (is_map<T>::value) {
    tree.kind = Tree::Kind::map;
    for (auto& [key, element] : value) tree.entries.push_back({key, to_tree(element)});
  } else if constexpr (is_optional<T>::value) {
    if (value) tree = to_tree(*value);
  } else if constexpr (Section<T>) {
    tree.kind = Tree::Kind::map;
    FieldWriter writer{tree};
    value.visit_fields(writer);
  } else if constexpr (Choosable<T>) {
    tree = scalar_tree(name_of(value));
  } else {
    tree = scalar_tree(std::as_const(value));
  }
  return tree;
}

// What a key takes, as docs call it; `many`: several of them.
template <class T>
std::string type_name(const Constraint& constraint, bool many = false) {
  if constexpr (std::same_as<T, bool>)
    return "true or false";
  else if constexpr (std::same_as<T, int64_t>)
    return many ? "integers" : "integer";
  else if constexpr (std::same_as<T, double>)
    return many ? "numbers" : "number";
  else if constexpr (std::same_as<T, std::string>)
    return (constraint.path ? "path" : "text") + std::string(many ? "s" : "");
  else if constexpr (Choosable<T>)
    return many ? "texts" : "text";
  else if constexpr (is_vector<T>::value)
    return (many ? "lists of " : "list of ") + type_name<typename T::value_type>(constraint, true);
  else if constexpr (is_map<T>::value)
    return (many ? "mappings of names to " : "mapping of names to ") +
           type_name<typename T::mapped_type>(constraint, true);
  else if constexpr (is_optional<T>::value)
    return "optional " + type_name<typename T::value_type>(constraint, many);
  else
    return many ? "sections" : "section";
}

// Of an enum, or of what a list, mapping or optional of enums holds.
template <class T>
std::vector<Choice> choices_in() {
  if constexpr (Choosable<T>)
    return list_choices<T>();
  else if constexpr (is_vector<T>::value || is_optional<T>::value)
    return choices_in<typename T::value_type>();
  else if constexpr (is_map<T>::value)
    return choices_in<typename T::mapped_type>();
  else
    return {};
}

struct FieldDescriber {
  std::string prefix;
  bool in_entry;
  std::vector<Key>& out;

  template <class F>
  void operator()(const char* name, F& field, const Constraint& constraint, const char* doc) {
    Key key{.path = join_path(prefix, name),
            .type = type_name<F>(constraint),
            .min = constraint.min,
            .max = constraint.max,
            .choices = choices_in<F>(),
            .default_text = "",
            .meaning = doc,
            .required = constraint.required,
            .in_entry = in_entry};
    for (const std::string& choice : constraint.choices) key.choices.push_back({choice, ""});
    if constexpr (!Section<F>) key.default_text = to_flow(to_tree(field));
    out.push_back(key);
    below(key.path, field, in_entry);
  }
  // Keys that every value of the tag has, then the others, which name the values that have them.
  template <class F>
  void describe_tagged(const std::string& path, F& field, bool entry) {
    std::vector<Key> all;
    std::vector<std::vector<std::string>> tags;  // that have each of them
    const auto rows = choices_of(field.tag());
    for (const auto& row : rows) {
      std::vector<Key> keys;
      field.tag() = row.value;
      FieldDescriber inner{path, entry, keys};
      field.visit_fields(inner);
      for (Key& key : keys) {
        const auto known =
            std::find_if(all.begin(), all.end(), [&](const Key& other) { return other.path == key.path; });
        const auto i = size_t(known - all.begin());
        if (known == all.end()) all.push_back(std::move(key)), tags.emplace_back();
        tags[i].push_back(row.name);
      }
    }
    for (const bool common : {true, false})
      for (size_t i = 0; i < all.size(); ++i) {
        if ((tags[i].size() == rows.size()) != common) continue;
        out.push_back(all[i]);
        if (!common) out.back().meaning = "(" + join(tags[i], ", ") + ") " + all[i].meaning;
      }
  }
  // The keys inside a section, or inside what a list, mapping or optional holds.
  template <class F>
  void below(const std::string& path, F& field, bool entry) {
    if constexpr (Tagged<F>) {
      describe_tagged(path, field, entry);
    } else if constexpr (Section<F>) {
      FieldDescriber inner{path, entry, out};
      field.visit_fields(inner);
    } else if constexpr (is_vector<F>::value) {
      typename F::value_type element{};
      below(path + "[]", element, true);
    } else if constexpr (is_map<F>::value) {
      typename F::mapped_type element{};
      below(path + ".<name>", element, true);
    } else if constexpr (is_optional<F>::value) {
      typename F::value_type element{};
      below(path, element, true);
    }
  }
};

}  // namespace detail

// The struct that a document describes: defaults where a key is absent, every rule checked. UsageError: unknown key
// (nearest one named), wrong type, out of range, not one of the choices, missing, moved (the new place named); or
// whatever a validate() throws.
template <detail::Section T>
T parse(const Document& document) {
  const detail::Cursor root{&document.root(), "", document.name()};
  if constexpr (detail::HasMovedKeys<T>) detail::refuse_moved(root, T::moved_keys());
  T value{};
  detail::read_section(root, value);
  return value;
}

// parse() of what dump() wrote, perhaps in an earlier version: keys that have moved since are read at their old places
// too.
template <detail::HasMovedKeys T>
T parse_stored(const Document& document) {
  const Tree root = detail::migrated(document.root(), T::moved_keys());
  T value{};
  detail::read_section(detail::Cursor{&root, "", document.name()}, value);
  return value;
}

// YAML text with every key; parse gives back equal values (doubles bit for bit).
template <detail::Section T>
std::string dump(T value) {
  return detail::to_block(detail::to_tree(value));
}

// Every key, in the order of the field lists; a section before its own keys.
template <detail::Section T>
std::vector<Key> describe() {
  T value{};
  std::vector<Key> keys;
  detail::FieldDescriber describer{"", false, keys};
  value.visit_fields(describer);
  return keys;
}

}  // namespace moegraft::config
