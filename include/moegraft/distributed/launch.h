#pragma once
// Who this process is among its peers, from what the launcher left in the environment.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace moegraft::distributed {

struct LaunchEnvironment {
  std::string launcher = "none";  // torchrun (any launcher with its variables, ours too), slurm, openmpi, none
  int64_t rank = 0, world_size = 1;
  int64_t local_rank = 0, local_world_size = 1;  // on this machine
  std::string master_address = "127.0.0.1";      // where the store is
  int64_t master_port = 29500;
  int64_t restart = 0;       // how often the launcher has brought the run back
  std::string token;         // what all ranks of one run share and others do not know: MOEGRAFT_TOKEN (set by `moegraft
                             // launch`), or the job's id
  bool agent_store = false;  // torchrun's agent is the store's server: every rank is a client

  bool distributed() const { return world_size > 1; }
};

// torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_*. srun:
// SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, the first host of SLURM_STEP_NODELIST and a port from the job id where
// MASTER_* are unset. mpirun: OMPI_COMM_WORLD_*. An allocation without srun (SLURM_* but one task) is one process.
// UsageError names the variable that is missing or out of range.
using Getenv = std::function<std::optional<std::string>(const char*)>;
LaunchEnvironment read_launch_environment(const Getenv& get = {});  // empty: the process's environment

// A port that nobody listens on at the moment, on this machine's loopback device.
int free_port();

// 128 random bits as hex: a name that no other start has.
std::string random_token();

}  // namespace moegraft::distributed
