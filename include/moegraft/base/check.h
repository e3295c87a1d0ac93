#pragma once
// Errors. UserError: something the user can change (a config value, a file, a shape); exit code 1, or 2 for UsageError.
// InvariantError: our bug. Both carry one line: what, expected, got, remedy.

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft {

class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Bad command line or configuration: the process exits with 2.
class UsageError : public UserError {
 public:
  using UserError::UserError;
};

class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace detail {

template <class T>
void append(std::ostringstream& out, const std::vector<T>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}
template <class T>
void append(std::ostringstream& out, const T& value) {
  out << value;
}

template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (append(out, args), ...);
  return out.str();
}

// A check that cannot fire is a bug: reject literals as conditions at compile time.
constexpr bool is_literal(std::string_view text) {
  return text == "true" || text == "false" || text == "nullptr" || text.empty() || text.front() == '"' ||
         text.find_first_not_of("0123456789") == std::string_view::npos;
}

[[noreturn]] void throw_invariant(const char* file, int line, const char* condition, const std::string& message);

}  // namespace detail

// Throws E (UserError, UsageError) with the arguments concatenated.
template <class E = UserError, class... Args>
[[noreturn]] void fail(const Args&... args) {
  throw E(detail::concat(args...));
}

}  // namespace moegraft

#define MOEGRAFT_CHECK_AS(error, condition, ...)                                                                  \
  do {                                                                                                            \
    static_assert(!::moegraft::detail::is_literal(#condition), "the condition of a check must not be a literal"); \
    if (!(condition)) [[unlikely]]                                                                                \
      ::moegraft::fail<error>(__VA_ARGS__);                                                                       \
  } while (0)
#define MOEGRAFT_CHECK(condition, ...) MOEGRAFT_CHECK_AS(::moegraft::UserError, condition, __VA_ARGS__)
#define MOEGRAFT_CHECK_USAGE(condition, ...) MOEGRAFT_CHECK_AS(::moegraft::UsageError, condition, __VA_ARGS__)
#define MOEGRAFT_INVARIANT(condition, ...)                                                                          \
  do {                                                                                                              \
    static_assert(!::moegraft::detail::is_literal(#condition), "the condition of a check must not be a literal");   \
    if (!(condition)) [[unlikely]]                                                                                  \
      ::moegraft::detail::throw_invariant(__FILE__, __LINE__, #condition, ::moegraft::detail::concat(__VA_ARGS__)); \
  } while (0)
