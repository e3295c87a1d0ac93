#pragma once
// Records (records.h) as JSON: an object with a key for each field. visit_fields(v) of a record calls v("key", field),
// and v.by_name("prefix_", map) for keys that end with the name of a modality.

#include <concepts>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/json.h"

namespace moegraft::run::fields {

template <class T>
io::Json to_value(const T& field);
template <class T>
T from_value(const io::Json& value, const std::string& what);

struct Writer {
  io::Json out = io::Json::object();
  template <class T>
  void operator()(const char* key, const T& field) {
    out[key] = to_value(field);
  }
  template <class T>
  void operator()(const char* key, const std::optional<T>& field) {
    if (field) out[key] = to_value(*field);
  }
  void by_name(const std::string& prefix, const std::map<std::string, double>& fields) {
    for (const auto& [name, value] : fields) out[prefix + name] = value;
  }
};

struct Reader {
  const io::Json& in;
  const std::string& where;
  template <class T>
  void operator()(const char* key, T& field) {
    const auto at = in.find(key);
    MOEGRAFT_CHECK(at != in.end(), where, ": \"", key, "\" is missing");
    field = from_value<T>(*at, place(key));
  }
  template <class T>
  void operator()(const char* key, std::optional<T>& field) {
    if (const auto at = in.find(key); at != in.end()) field = from_value<T>(*at, place(key));
  }
  void by_name(const std::string& prefix, std::map<std::string, double>& fields) {
    for (const auto& [key, value] : in.items())
      if (key.starts_with(prefix)) fields[key.substr(prefix.size())] = from_value<double>(value, place(key));
  }
  std::string place(const std::string& key) const { return where + ": \"" + shortened(key) + "\""; }
};

template <class T>
concept Record = requires(T& record, Reader& v) { record.visit_fields(v); };
template <class T>
concept List = std::same_as<T, std::vector<typename T::value_type>>;
template <class T>
concept Named = std::same_as<T, std::map<std::string, typename T::mapped_type>>;

template <class T>
io::Json to_value(const T& field) {
  if constexpr (Record<T>) {
    Writer writer;
    T(field).visit_fields(writer);  // of a copy: Reader writes through the same list
    return std::move(writer.out);
  } else if constexpr (List<T>) {
    io::Json list = io::Json::array();
    for (const auto& element : field) list.push_back(to_value(element));
    return list;
  } else {
    return field;
  }
}

// what: the value's name in messages.
template <class T>
T from_value(const io::Json& value, const std::string& what) {
  const auto expect = [&](bool fits, const char* kind) {
    MOEGRAFT_CHECK(fits, what, " must be ", kind, ", got ", shortened(value.dump()));
  };
  T field{};
  if constexpr (Record<T>) {
    expect(value.is_object(), "an object");
    Reader reader{value, what};
    field.visit_fields(reader);
  } else if constexpr (List<T>) {
    expect(value.is_array(), "a list");
    for (size_t i = 0; i < value.size(); ++i)
      field.push_back(from_value<typename T::value_type>(value[i], what + "[" + std::to_string(i) + "]"));
  } else if constexpr (Named<T>) {
    expect(value.is_object(), "an object");
    for (const auto& [name, element] : value.items())
      field[name] = from_value<typename T::mapped_type>(element, what + "." + shortened(name));
  } else if constexpr (std::same_as<T, double>) {
    if (value.is_null()) return std::numeric_limits<double>::quiet_NaN();  // JSON has no NaN
    expect(value.is_number(), "a number");
    value.get_to(field);
  } else if constexpr (std::same_as<T, int64_t>) {
    expect(value.is_number_integer(), "an integer");
    value.get_to(field);
  } else if constexpr (std::same_as<T, bool>) {
    expect(value.is_boolean(), "true or false");
    value.get_to(field);
  } else {
    expect(value.is_string(), "a text");
    value.get_to(field);
  }
  return field;
}

}  // namespace moegraft::run::fields
