#pragma once
// What the world and its groups share: the store, and what a failed collective can find out from it.

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "moegraft/distributed/communicator.h"
#include "moegraft/distributed/launch.h"

namespace moegraft::distributed {

using Clock = std::chrono::steady_clock;

class StoreGuard;
class Watch;

struct Shared {
  LaunchEnvironment environment;
  at::Device device = at::kCPU;
  std::chrono::milliseconds timeout{};
  c10::intrusive_ptr<c10d::Store> store;          // short round trips only
  c10::intrusive_ptr<c10d::Store> backend_store;  // a connection of its own: backends wait on it for minutes
  std::unique_ptr<Watch> watch;                   // where the device is a GPU
  std::unique_ptr<StoreGuard> guard;              // null: alone
  std::chrono::milliseconds patience() const;     // with a round trip to the store

  Shared();
  ~Shared();

  // UserError when the store is gone: it ends with rank 0 or the launcher's agent.
  void post(const std::string& key, const std::string& value) const;
  std::optional<std::string> look(const std::string& key) const;

  // Some rank has failed in a collective, or said that it leaves: no collective that is still under way will end.
  bool trouble() const noexcept;
  void post_trouble() const;
};

// One group and its backends, alive until the world ends: closing connections earlier would break a slower member's
// last collective.
struct Group {
  std::shared_ptr<Shared> shared;
  std::string name;
  std::vector<int64_t> ranks;  // of the world
  int64_t rank = 0;            // in the group
  c10::intrusive_ptr<c10d::Backend> gloo, nccl;
  std::atomic<int64_t> calls{0};
  std::atomic<bool> failed{false};  // nobody waits for its works any more; they keep their tensors themselves
  std::mutex mutex;
  Traffic traffic;
};

struct Communicator::Backends {
  std::shared_ptr<Group> group;
};

// "rank 1", "ranks 0, 2-5".
std::string name_ranks(const std::vector<int64_t>& ranks);

// Members that wait look for trouble this often, and one that failed waits longer than that for what they say.
constexpr auto kLookPause = std::chrono::milliseconds(200);
constexpr auto kHearing = std::chrono::milliseconds(1000);

// One line of why a collective of the group failed: what the members have said in the store. Takes up to kHearing.
// Marks the group as failed.
std::string explain_failure(Group& group, const std::string& operation, int64_t call, double seconds,
                            const std::string& cause);

}  // namespace moegraft::distributed
