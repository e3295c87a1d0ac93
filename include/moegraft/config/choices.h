#pragma once
// An enum as a config's value. One table beside the enum names its values; parsing, errors, dump and docs ask the
// table:
//
//   enum class Schedule { cosine, linear, constant };
//   inline constexpr config::Named<Schedule> kSchedules[] = {{Schedule::cosine, "cosine", "down to min_lr_ratio along a
//   cosine"}, …}; constexpr std::span<const config::Named<Schedule>> choices_of(Schedule) { return kSchedules; }   //
//   found by argument-dependent lookup
//
// A table whose values come with more than a name and a meaning has rows of its own type, with these three members
// among them. Include config.h, not this file.

#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/config/keys.h"

namespace moegraft::config {

template <class E>
struct Named {
  E value;
  const char* name;
  const char* meaning = "";  // empty: the key's own says it all
};

template <class E>
concept Choosable = std::is_enum_v<E> && requires(E e) {
  { choices_of(e)[0].value } -> std::convertible_to<E>;
  { choices_of(e)[0].name } -> std::convertible_to<std::string>;
  { choices_of(e)[0].meaning } -> std::convertible_to<std::string>;
};

// The table's row of a value.
template <Choosable E>
const auto& row_of(E value) {
  const auto rows = choices_of(value);
  size_t i = 0;
  while (i < rows.size() && rows[i].value != value) ++i;
  MOEGRAFT_INVARIANT(i < rows.size(), "the value ", int64_t(value), " is not in the table of its enum");
  return rows[i];
}

template <Choosable E>
std::string name_of(E value) {
  return row_of(value).name;
}

// The value of a name that did not come through a config: an option of a command, say. what: "--device". UsageError for
// a name that the table does not have.
template <Choosable E>
E parse_choice(const std::string& what, const std::string& name) {
  std::string known;
  const auto rows = choices_of(E{});
  for (size_t i = 0; i < rows.size(); ++i) {
    if (name == rows[i].name) return rows[i].value;
    known += (i == 0 ? "" : i + 1 == rows.size() ? " or " : ", ") + std::string(rows[i].name);
  }
  fail<UsageError>(what, " must be ", known, ", got '", name, "'");
}

template <Choosable E>
std::vector<Choice> list_choices() {
  std::vector<Choice> list;
  for (const auto& row : choices_of(E{})) list.push_back({row.name, row.meaning});
  return list;
}

}  // namespace moegraft::config
