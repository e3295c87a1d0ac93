#include "shared.h"

#include <algorithm>
#include <sstream>
#include <thread>

#include "moegraft/base/check.h"
#include "store_guard.h"
#include "watch.h"

namespace moegraft::distributed {
namespace {

// "step 16, 31 s ago", from "step milliseconds-since-the-epoch".
std::string last_seen(const Shared& shared, int64_t rank) {
  const auto beat = shared.look("beat/" + std::to_string(rank));
  if (!beat) return "not seen since the start";
  int64_t step = 0, at = 0;
  std::istringstream(*beat) >> step >> at;
  const auto now =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  return detail::concat("last seen at step ", step, ", ", (now - at + 500) / 1000, " s ago");
}

[[noreturn]] void store_is_gone(const Shared& shared) {
  const auto& e = shared.environment;
  fail<UserError>("rank ", e.rank, ": ", e.agent_store ? "the launcher's agent" : "rank 0", " has ended (its store at ",
                  e.master_address, ':', e.master_port, " does not answer): see its error");
}

}  // namespace

Shared::Shared() = default;
Shared::~Shared() = default;

// A server may be busy for seconds; longer than the timeout of collectives nobody waits.
std::chrono::milliseconds Shared::patience() const {
  return std::clamp(timeout, std::chrono::milliseconds(2'000), std::chrono::milliseconds(120'000));
}

namespace {

std::unique_ptr<StoreGuard::Call> guarded(const Shared& shared) {
  return shared.guard ? std::make_unique<StoreGuard::Call>(*shared.guard, shared.patience()) : nullptr;
}

}  // namespace

void Shared::post(const std::string& key, const std::string& value) const {
  const auto call = guarded(*this);
  try {
    store->set(key, value);
  } catch (const c10::Error&) { store_is_gone(*this); }
}

std::optional<std::string> Shared::look(const std::string& key) const {
  const auto call = guarded(*this);
  try {
    if (!store->check({key})) return {};  // get() alone would wait for the key, and hold every other thread's request
    return store->get_to_str(key);
  } catch (const c10::Error&) { store_is_gone(*this); }
}

bool Shared::trouble() const noexcept {
  const auto call = guarded(*this);
  try {
    return environment.distributed() && store->check({"trouble"});
  } catch (const std::exception&) { return true; }
}

void Shared::post_trouble() const { post("trouble", std::to_string(environment.rank)); }

std::string name_ranks(const std::vector<int64_t>& ranks) {
  std::ostringstream out;
  out << (ranks.size() == 1 ? "rank " : "ranks ");
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i;
    while (end + 1 < ranks.size() && ranks[end + 1] == ranks[end] + 1) ++end;
    if (end < i + 2) end = i;  // two neighbours: "0, 1"
    out << (i ? ", " : "") << ranks[i];
    if (end > i) out << '-' << ranks[end];
    i = end + 1;
  }
  return out.str();
}

std::string explain_failure(Group& group, const std::string& operation, int64_t call, double seconds,
                            const std::string& cause) {
  const Shared& shared = *group.shared;
  group.failed = true;
  std::ostringstream out;
  out.precision(1);
  out << std::fixed << "rank " << shared.environment.rank << ": " << operation << " in group " << group.name << " ("
      << name_ranks(group.ranks) << ") failed after " << seconds << " s: ";
  try {
    const std::string here = detail::concat(group.name, ' ', call);
    shared.post("stuck/" + std::to_string(shared.environment.rank), here);
    shared.post_trouble();
    std::vector<int64_t> others;
    for (const int64_t r : group.ranks) {
      if (r != shared.environment.rank) others.push_back(r);
    }
    std::vector<int64_t> silent, waiting;
    std::string said;
    // Members that fail with us say so within moments; one that died or hangs never does.
    for (const auto deadline = Clock::now() + kHearing;;) {
      silent.clear(), waiting.clear(), said.clear();
      for (const int64_t r : others) {
        const std::string id = std::to_string(r);
        const auto failure = shared.look("failure/" + id);
        const auto stuck = failure ? std::nullopt : shared.look("stuck/" + id);
        if (failure) {
          said += detail::concat(said.empty() ? "" : "; ", "rank ", r, " failed with: ", *failure);
        } else if (stuck && *stuck == here) {
          waiting.push_back(r);
        } else if (shared.look("left/" + id)) {
          said += detail::concat(said.empty() ? "" : "; ", "rank ", r, " has left the run");
        } else {
          silent.push_back(r);
        }
      }
      if (silent.empty() || Clock::now() > deadline) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(25));
    }
    for (const int64_t r : silent)
      said += detail::concat(said.empty() ? "" : "; ", "rank ", r, " did not take part (", last_seen(shared, r), ")");
    if (!waiting.empty())
      said += detail::concat(said.empty() ? "" : "; ", name_ranks(waiting), waiting.size() == 1 ? " waits" : " wait",
                             " in it too");
    out << said;
  } catch (const std::exception&) {
    out << (shared.environment.agent_store ? "the launcher's agent" : "rank 0") << " has ended, see its error";
  }
  out << " (" << cause << ')';
  return out.str();
}

}  // namespace moegraft::distributed
