#pragma once
// A JSON value with its place in the file, so that each error names file and key.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::tokenizer {

class Field {
 public:
  Field(const nlohmann::json& value, std::string place) : value_(&value), place_(std::move(place)) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& place() const { return place_; }

  // True when the key is there and not null.
  bool has(const char* key) const {
    expect(value_->is_object(), "an object");
    const auto it = value_->find(key);
    return it != value_->end() && !it->is_null();
  }
  Field at(const char* key) const {
    MOEGRAFT_CHECK(has(key), place_, ": the key '", key, "' is missing");
    return {(*value_)[key], place_ + "." + key};
  }
  std::vector<Field> items() const {
    expect(value_->is_array(), "an array");
    std::vector<Field> out;
    for (size_t i = 0; i < value_->size(); ++i) out.emplace_back((*value_)[i], place_ + "[" + std::to_string(i) + "]");
    return out;
  }
  std::string string() const {
    expect(value_->is_string(), "a string");
    return value_->get<std::string>();
  }
  int64_t integer(int64_t low, int64_t high) const {
    expect(value_->is_number_integer() && *value_ >= low && *value_ <= high,
           "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]");
    return value_->get<int64_t>();
  }
  bool boolean() const {
    expect(value_->is_boolean(), "true or false");
    return value_->get<bool>();
  }
  std::string string_or(const char* key, std::string otherwise) const {
    return has(key) ? at(key).string() : std::move(otherwise);
  }
  bool boolean_or(const char* key, bool otherwise) const { return has(key) ? at(key).boolean() : otherwise; }
  std::string type() const { return at("type").string(); }

  void expect(bool holds, std::string_view what) const {
    if (holds) return;
    std::string got = value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    fail<UserError>(place_, ": expected ", what, ", got ", shortened(got, 60));
  }
  [[noreturn]] void unsupported(std::string_view kind, std::string_view known) const {
    fail<UserError>(place_, ": ", kind, " '", shortened(type()), "' is not supported; known: ", known);
  }

 private:
  const nlohmann::json* value_;
  std::string place_;
};

}  // namespace moegraft::tokenizer
