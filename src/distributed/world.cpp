#include "moegraft/distributed/world.h"

#include <csignal>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "agreement.h"
#include "gloo.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "nccl.h"
#include "rendezvous.h"
#include "shared.h"
#include "store_guard.h"
#include "watch.h"

namespace moegraft::distributed {

using namespace std::chrono_literals;

struct World::Impl {
  std::shared_ptr<Shared> shared;
  bool backend_for_one = false, failed = false;
  std::vector<std::shared_ptr<Group>> groups;  // alive until the end, see Group
  std::shared_ptr<Communicator> all;
  int64_t agreements = 0, splits = 0;

  std::shared_ptr<Group> connect(const std::string& name, const std::vector<int64_t>& ranks, int64_t rank,
                                 const std::string& prefix) {
    auto group = std::make_shared<Group>();
    group->shared = shared, group->name = name, group->ranks = ranks, group->rank = rank;
    const auto& e = shared->environment;
    if (ranks.size() > 1 || backend_for_one) {
      const auto size = static_cast<int>(ranks.size());
      const auto store = [&](const char* kind) {
        return c10::make_intrusive<c10d::PrefixStore>(
            prefix + '/' + kind, stop_at_trouble(shared->backend_store, [s = shared.get()] { return s->trouble(); }));
      };
      const auto begin = Clock::now();
      // Backends wait in the store for the others' addresses.
      std::optional<StoreGuard::Call> call;
      if (shared->guard) call.emplace(*shared->guard, shared->timeout + shared->patience());
      try {
        group->gloo = make_gloo(store("gloo"), static_cast<int>(rank), size, shared->timeout,
                                {e.master_address, e.master_port, e.local_world_size == e.world_size});
        if (shared->device.is_cuda())
          group->nccl = make_nccl(store("nccl"), static_cast<int>(rank), size, shared->timeout, name, shared->device);
      } catch (const UserError&) { throw; } catch (const std::exception& error) {
        const std::string what = error.what();
        throw UserError(explain_failure(*group, "connecting", group->calls++, seconds_since(begin),
                                        what.substr(0, what.find('\n'))));
      }
    }
    groups.push_back(group);
    return group;
  }

  // Connections and the store stay until everybody is through: a faster rank's exit must not break a slower one's last
  // collective or message.
  void leave() {
    if (!shared->environment.distributed()) return;
    const int64_t rank = shared->environment.rank, size = shared->environment.world_size;
    for (const auto& group : groups) failed = failed || group->failed;
    failed = failed || std::uncaught_exceptions() > 0;
    // A backend ends only when its works have, and after a failure they may wait for their whole timeout: then the
    // process's end closes its connections.
    if (failed) static_cast<void>(new std::vector<std::shared_ptr<Group>>(groups));
    shared->post("left/" + std::to_string(rank), "1");
    const auto wait_for = [&](const char* key, std::chrono::milliseconds limit) {
      for (const auto deadline = Clock::now() + limit; Clock::now() < deadline; std::this_thread::sleep_for(5ms)) {
        bool all = true;
        for (int64_t r = 0; r < size && all; ++r) all = r == rank || shared->look(key + std::to_string(r));
        if (all || (!failed && shared->trouble())) return;
      }
    };
    if (!failed) wait_for("left/", 5s);
    shared->post("gone/" + std::to_string(rank), "1");
    if (rank == 0 && !shared->environment.agent_store) wait_for("gone/", 2s);
  }
};

World::World(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

World::~World() {
  try {
    impl_->leave();
  } catch (const std::exception&) {  // the store went first
  }
  impl_->shared->guard.reset();
  impl_->shared->watch.reset();  // here, so that its own thread is never the one that ends it
}

std::shared_ptr<World> World::join(const LaunchEnvironment& environment, const WorldOptions& options) {
  // A message to a process that is gone must be an error that names it: Gloo's sockets raise this signal, which would
  // end us without a word.
  if (environment.distributed()) std::signal(SIGPIPE, SIG_IGN);
  auto impl = std::make_unique<Impl>();
  impl->shared = std::make_shared<Shared>();
  impl->shared->environment = environment;
  impl->shared->device = options.device;
  impl->shared->timeout = options.timeout;
  impl->backend_for_one = options.backend_for_one;
  if (environment.distributed())
    impl->shared->guard = std::make_unique<StoreGuard>(
        detail::concat("rank ", environment.rank, ": ", environment.agent_store ? "the launcher's agent" : "rank 0",
                       " (its store at ", environment.master_address, ':', environment.master_port, ")"));
  meet(*impl->shared);
  if (options.device.is_cuda())
    impl->shared->watch = std::make_unique<Watch>(
        options.timeout, [shared = impl->shared.get()] { return shared->trouble(); }, Watch::End(), options.device);
  auto world = std::shared_ptr<World>(new World(std::move(impl)));
  std::vector<int64_t> everybody(static_cast<size_t>(environment.world_size));
  for (size_t i = 0; i < everybody.size(); ++i) everybody[i] = static_cast<int64_t>(i);
  world->impl_->all = world->split("world", {everybody});
  return world;
}

const LaunchEnvironment& World::environment() const { return impl_->shared->environment; }
int64_t World::rank() const { return impl_->shared->environment.rank; }
int64_t World::size() const { return impl_->shared->environment.world_size; }
Communicator& World::all() { return *impl_->all; }

std::shared_ptr<Communicator> World::split(const std::string& name, const std::vector<std::vector<int64_t>>& groups) {
  const int64_t number = impl_->splits++;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (size_t j = 0; j < groups[i].size(); ++j) {
      if (groups[i][j] != rank()) continue;
      auto backends = std::make_unique<Communicator::Backends>();
      backends->group = impl_->connect(name, groups[i], static_cast<int64_t>(j), detail::concat(number, '/', i));
      return std::shared_ptr<Communicator>(
          new Communicator(name, groups[i], static_cast<int64_t>(j), std::move(backends)));
    }
  }
  fail<InvariantError>("rank ", rank(), " is in none of the groups of '", name, "'");
}

void World::post(const std::string& key, const std::string& value) { impl_->shared->post("user/" + key, value); }
std::optional<std::string> World::look(const std::string& key) { return impl_->shared->look("user/" + key); }

void World::beat(int64_t step) {
  if (size() == 1) return;
  const auto now =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  try {
    impl_->shared->post("beat/" + std::to_string(rank()), detail::concat(step, ' ', now));
  } catch (const UserError&) {  // rank 0 has ended: the next collective says why
  }
}

void World::announce_failure(const std::string& error) {
  impl_->failed = true;
  if (size() == 1) return;
  try {
    impl_->shared->post("failure/" + std::to_string(rank()), error);
    impl_->shared->post_trouble();
  } catch (const std::exception&) {  // the store is gone: nobody is left to tell
  }
}

void World::agree(const std::vector<Fact>& facts, const std::optional<std::string>& error) {
  const int64_t number = impl_->agreements++;
  try {
    reach_agreement(*impl_->shared, number, facts, error);
  } catch (const UserError&) {
    impl_->failed = true;  // every rank leaves, and none waits for the others' collectives
    throw;
  }
}

Mesh make_mesh(std::shared_ptr<World> world, int64_t expert) {
  const int64_t size = world->size();
  MOEGRAFT_CHECK_USAGE(expert >= 1 && size % expert == 0,
                       "parallel.expert must divide the number of processes, got parallel.expert ", expert, " with ",
                       size, size == 1 ? " process" : " processes", ": start a multiple of it, or change it");
  std::vector<std::vector<int64_t>> expert_groups(static_cast<size_t>(size / expert)),
      data_groups(static_cast<size_t>(expert));
  for (int64_t r = 0; r < size; ++r) {
    expert_groups[static_cast<size_t>(r / expert)].push_back(r);
    data_groups[static_cast<size_t>(r % expert)].push_back(r);
  }
  Mesh mesh;
  mesh.expert = world->split("expert", expert_groups);
  mesh.data = world->split("data", data_groups);
  mesh.world = std::move(world);
  return mesh;
}

}  // namespace moegraft::distributed
