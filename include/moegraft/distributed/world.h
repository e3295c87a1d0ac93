#pragma once
// All processes of a run: rendezvous, agreement, groups, mesh.

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/distributed/communicator.h"
#include "moegraft/distributed/launch.h"

namespace moegraft::distributed {

struct WorldOptions {
  at::Device device = at::kCPU;                // CUDA: groups also get NCCL
  std::chrono::milliseconds timeout{600'000};  // of one collective, and of the rendezvous
  bool backend_for_one =
      false;  // a group of one process gets its backend too, and its collectives run on it (tests, benchmarks)
};

class World {
 public:
  // Meets the others at the store. UserError when they do not all come within the timeout: names the ranks that are
  // missing. world_size 1: no network.
  static std::shared_ptr<World> join(const LaunchEnvironment& environment, const WorldOptions& options = {});
  ~World();

  const LaunchEnvironment& environment() const;
  int64_t rank() const;
  int64_t size() const;

  // Before any collective: each rank gives facts that must be equal everywhere ({"config": …, "version": …}), or the
  // error that stopped it. Returns when all agree; otherwise throws on every rank the same kind of one-line error:
  // which rank failed with what, or which fact differs between which ranks.
  struct Fact {
    std::string name, value;
  };
  void agree(const std::vector<Fact>& facts, const std::optional<std::string>& error = {});

  // Groups. Collective: every rank calls with the same list of disjoint groups, and gets the one it is in.
  std::shared_ptr<Communicator> split(const std::string& name, const std::vector<std::vector<int64_t>>& groups);
  Communicator& all();  // the group of everybody, "world"

  // A small shared dictionary (the store), for what is not in step: safe from any thread, never blocks for longer than
  // a round trip.
  void post(const std::string& key, const std::string& value);
  std::optional<std::string> look(const std::string& key);

  // Told once a step: what timeouts say of the others ("rank 2 was last seen at step 16, 31 s ago").
  void beat(int64_t step);
  // Before leaving because of an error: others that wait for this rank name it as the reason. Never throws.
  void announce_failure(const std::string& error);

 private:
  struct Impl;
  explicit World(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// data x expert: rank = data_index * expert + expert_index, so that an expert group's ranks are neighbours (one
// machine's fast links). Every rank computes its own tokens. Experts are spread over the expert group; ranks with equal
// expert_index hold the same experts (the data group).
struct Mesh {
  std::shared_ptr<World> world;
  std::shared_ptr<Communicator> expert, data;  // of this rank
  int64_t expert_size() const { return expert->size(); }
  int64_t data_size() const { return data->size(); }
  bool distributed() const { return world->size() > 1; }
};
// UserError: expert does not divide the world's size.
Mesh make_mesh(std::shared_ptr<World> world, int64_t expert);

}  // namespace moegraft::distributed
