#pragma once
// How many of the library's operations a piece of code runs, those left out that only allocate or look at memory: what
// a device launches, or nearly (a copy inside an operation is not seen). An operation on a list counts as one: the host
// walks the list, a device does not.

#include <ATen/record_function.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

namespace moegraft {

class LaunchCount {
 public:
  void begin(std::string_view name) {
    if (within_list_ > 0 || is_of_list(name)) ++within_list_;
    if (within_list_ > 1) return;
    calls_others_.back() = calls_others_.back() || !is_free(name);
    calls_others_.push_back(false);
  }
  void end(std::string_view name) {
    if (within_list_ > 1) {
      --within_list_;
      return;
    }
    within_list_ = 0;
    count += !calls_others_.back() && name.starts_with("aten::") && !is_free(name);  // ours carry names too
    calls_others_.pop_back();
  }
  int64_t count = 0;

 private:
  static bool is_of_list(std::string_view name) {
    return name.starts_with("aten::_foreach_") || name.starts_with("aten::_fused_");
  }
  static bool is_free(std::string_view name) {
    static const std::set<std::string_view> kFree{
        "aten::empty",     "aten::empty_like", "aten::empty_strided", "aten::t",
        "aten::transpose", "aten::narrow",     "aten::slice",         "aten::select",
        "aten::view",      "aten::as_strided", "aten::detach",        "aten::alias",
        "aten::expand",    "aten::unsqueeze",  "aten::reshape",       "aten::to"};
    return kFree.contains(name);
  }
  std::vector<bool> calls_others_{false};  // of the operations under way
  int64_t within_list_ = 0;
};

template <class F>
int64_t launches(F&& work) {
  static thread_local LaunchCount counted;
  counted = {};
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback(
                                     [](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
                                       counted.begin(f.name());
                                       return nullptr;
                                     },
                                     [](const at::RecordFunction& f, at::ObserverContext*) { counted.end(f.name()); })
                                     .scopes({at::RecordScope::FUNCTION}));
  std::forward<F>(work)();
  at::removeCallback(handle);
  return counted.count;
}

}  // namespace moegraft
