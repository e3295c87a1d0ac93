#include "moegraft/distributed/launch.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::distributed {
namespace {

class Variables {
 public:
  explicit Variables(const Getenv& get) : get_(get) {}
  std::optional<std::string> find(const char* name) const {
    auto value = get_ ? get_(name) : from_process(name);
    if (value && value->empty()) value.reset();
    return value;
  }
  // In [low, high]; unset: the default, and without one an error that names the launcher whose variable it is.
  int64_t number(const char* name, int64_t low, int64_t high, std::optional<int64_t> otherwise,
                 const char* launcher) const {
    const auto text = find(name);
    if (!text) {
      MOEGRAFT_CHECK_USAGE(otherwise, name, " is not set, but this looks like a start by ", launcher,
                           ": start every rank by it, or unset its other variables");
      return *otherwise;
    }
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
    MOEGRAFT_CHECK_USAGE(error == std::errc() && end == text->data() + text->size() && value >= low && value <= high,
                         name, " must be a whole number in [", low, ", ", high, "], got '", *text, "' (set by ",
                         launcher, ")");
    return value;
  }

 private:
  static std::optional<std::string> from_process(const char* name) {
    const char* value = std::getenv(name);
    return value ? std::optional<std::string>(value) : std::nullopt;
  }
  const Getenv& get_;
};

constexpr int64_t kMaxWorld = 1 << 20;
constexpr int64_t kMaxPort = 65535;

// "node[03-05,9],x1" -> "node03": Slurm's short form of a list of hosts.
std::string first_host(const std::string& list) {
  const auto bracket = list.find('[');
  const auto comma = list.find(',');
  if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
  const auto end = list.find(']', bracket);
  MOEGRAFT_CHECK_USAGE(end != std::string::npos, "SLURM_STEP_NODELIST: no ']' in '", list,
                       "'; set MASTER_ADDR to the first host");
  const std::string first = list.substr(bracket + 1, list.find_first_of(",-]", bracket) - bracket - 1);
  // What follows the bracket belongs to the name, up to the next host; it may hold brackets of its own
  // ("rack[1-2]node[1-4]").
  return first_host(list.substr(0, bracket) + first + list.substr(end + 1));
}

void read_master(const Variables& get, const char* launcher, bool required, LaunchEnvironment& e) {
  const auto address = get.find("MASTER_ADDR");
  MOEGRAFT_CHECK_USAGE(address || !required, "MASTER_ADDR is not set, but there are ", e.world_size,
                       " ranks: it must name rank 0's machine (started by ", launcher, ")");
  if (address) e.master_address = *address;
  e.master_port = get.number("MASTER_PORT", 1, kMaxPort, e.master_port, launcher);
}

// A token of its own where one was given; a job's id at least keeps the jobs of one machine apart.
std::string read_token(const Variables& get) {
  for (const char* name : {"MOEGRAFT_TOKEN", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "OMPI_MCA_ess_base_jobid"})
    if (const auto value = get.find(name)) return *value;
  return {};
}

LaunchEnvironment from_torchrun(const Variables& get) {
  const char* launcher = "torchrun";
  LaunchEnvironment e;
  e.launcher = launcher;
  e.world_size = get.number("WORLD_SIZE", 1, kMaxWorld, {}, launcher);
  e.rank = get.number("RANK", 0, e.world_size - 1, {}, launcher);
  e.local_world_size = get.number("LOCAL_WORLD_SIZE", 1, e.world_size, e.world_size, launcher);
  e.local_rank = get.number("LOCAL_RANK", 0, e.local_world_size - 1, e.rank % e.local_world_size, launcher);
  e.restart = get.number("TORCHELASTIC_RESTART_COUNT", 0, kMaxWorld, 0, launcher);
  const auto shared = get.find("TORCHELASTIC_USE_AGENT_STORE");
  e.agent_store = shared && (*shared == "True" || *shared == "true" || *shared == "1");
  read_master(get, launcher, e.world_size > 1, e);
  return e;
}

LaunchEnvironment from_openmpi(const Variables& get) {
  const char* launcher = "mpirun";
  LaunchEnvironment e;
  e.launcher = "openmpi";
  e.world_size = get.number("OMPI_COMM_WORLD_SIZE", 1, kMaxWorld, {}, launcher);
  e.rank = get.number("OMPI_COMM_WORLD_RANK", 0, e.world_size - 1, {}, launcher);
  e.local_world_size = get.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, e.world_size, e.world_size, launcher);
  e.local_rank =
      get.number("OMPI_COMM_WORLD_LOCAL_RANK", 0, e.local_world_size - 1, e.rank % e.local_world_size, launcher);
  read_master(get, "mpirun: pass -x MASTER_ADDR", e.local_world_size < e.world_size, e);
  return e;
}

LaunchEnvironment from_slurm(const Variables& get) {
  const char* launcher = "srun";
  LaunchEnvironment e;
  e.launcher = "slurm";
  e.world_size = get.number(get.find("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", 1, kMaxWorld,
                            {}, launcher);
  e.rank = get.number("SLURM_PROCID", 0, e.world_size - 1, {}, launcher);
  // "2(x3),1": tasks on each node of the list, in order. Nodes may differ, so this node's count is its own place in the
  // list.
  e.local_rank = get.number("SLURM_LOCALID", 0, e.world_size - 1, {}, launcher);
  e.local_world_size = e.world_size;
  if (const auto tasks = get.find("SLURM_STEP_TASKS_PER_NODE")) {
    int64_t node = get.number("SLURM_NODEID", 0, kMaxWorld, 0, launcher);
    for (const std::string& part : split(*tasks, ',')) {
      const int64_t count = std::atoll(part.c_str());
      const auto times = part.find("(x");
      const int64_t nodes = times == std::string::npos ? 1 : std::atoll(part.c_str() + times + 2);
      if (count >= 1) e.local_world_size = count;
      if ((node -= nodes) < 0) break;
    }
  }
  MOEGRAFT_CHECK_USAGE(e.local_rank < e.local_world_size, "SLURM_LOCALID must be below the node's ", e.local_world_size,
                       " tasks (SLURM_STEP_TASKS_PER_NODE), got ", e.local_rank);
  // Jobs that share a node get ports of their own; below the range from which the kernel hands out ports for
  // connections.
  e.master_port = 20000 + get.number("SLURM_JOB_ID", 0, INT64_MAX / 2, 0, launcher) % 10000;
  if (const auto nodes = get.find("SLURM_STEP_NODELIST")) {
    e.master_address = first_host(*nodes);
  } else if (const auto job_nodes = get.find("SLURM_JOB_NODELIST")) {
    e.master_address = first_host(*job_nodes);
  } else {
    MOEGRAFT_CHECK_USAGE(e.world_size == e.local_world_size || get.find("MASTER_ADDR"),
                         "SLURM_STEP_NODELIST and MASTER_ADDR are not set, but there are ", e.world_size,
                         " ranks on several nodes: set MASTER_ADDR to rank 0's machine");
  }
  read_master(get, launcher, false, e);
  return e;
}

}  // namespace

namespace {

LaunchEnvironment find_launcher(const Variables& get) {
  // torchrun's variables first: it may itself have been started by srun or mpirun.
  if (get.find("RANK") || get.find("WORLD_SIZE")) return from_torchrun(get);
  if (get.find("OMPI_COMM_WORLD_SIZE") || get.find("OMPI_COMM_WORLD_RANK")) return from_openmpi(get);
  // A batch script or an interactive allocation has SLURM_NTASKS too; only srun's tasks are a step with a rank, and
  // salloc's shell may be a step of one.
  if (get.find("SLURM_PROCID") && get.find("SLURM_STEP_ID")) {
    const auto tasks = get.find("SLURM_STEP_NUM_TASKS") ? get.find("SLURM_STEP_NUM_TASKS") : get.find("SLURM_NTASKS");
    if (tasks && *tasks != "1") return from_slurm(get);
  }
  return {};
}

}  // namespace

LaunchEnvironment read_launch_environment(const Getenv& getter) {
  const Variables get(getter);
  LaunchEnvironment e = find_launcher(get);
  if (e.distributed()) e.token = read_token(get);
  return e;
}

int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  const bool bound = fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
                     getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  const int reason = errno;
  if (fd >= 0) close(fd);
  MOEGRAFT_CHECK(bound, "no free port on the loopback device (", std::strerror(reason), ")");
  return ntohs(address.sin_port);
}

std::string random_token() {
  std::random_device device;
  std::ostringstream out;
  for (int i = 0; i < 4; ++i) out << std::hex << device();
  return out.str();
}

}  // namespace moegraft::distributed
