#include "machine.h"

#include <array>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/numa.h"
#include "moegraft/distributed/launch.h"
#include "moegraft/kernels/cpu.h"
#include "moegraft/kernels/device_numerics.h"

namespace moegraft::tools {
namespace {

constexpr const char *kCpuPath = "--cpu-path", *kAttention = "--attention", *kNuma = "--numa";
constexpr const char* kNodes = "/sys/devices/system/node";

// Variables that were read once, and what there is instead.
struct Variable {
  const char *name, *option, *key;
};
constexpr Variable kOldVariables[]{
    {"MOEGRAFT_CPU_PATH", kCpuPath, "model.cpu_path"},
    {"MOEGRAFT_ATTENTION", kAttention, "model.attention"},
    {"MOEGRAFT_NUMA", kNuma, "parallel.numa"},
};

std::optional<std::string> given(const CLI::App& app, const char* option) {
  const CLI::Option* o = app.get_option(option);
  return o->count() > 0 ? std::optional(o->as<std::string>()) : std::nullopt;
}

// Near memory where a machine has several nodes of it. nodes: auto, off, or a folder to read in place of the kernel's.
// Where there are GPUs the launcher knows better which node a process's GPU hangs on, and memory of the host matters
// little.
std::string choose_memory(const std::string& nodes) {
  std::error_code error;
  if (nodes == "off" || (nodes == "auto" && std::filesystem::exists("/proc/driver/nvidia/gpus", error))) return {};
  try {
    const auto launched = distributed::read_launch_environment();
    return arrange_numa(launched.local_rank, launched.local_world_size, nodes == "auto" ? kNodes : nodes);
  } catch (const UserError&) {
    return {};  // said again, and better, by the command that needs it
  }
}

}  // namespace

void add_machine_options(CLI::App& app) {
  app.add_option(kCpuPath,
                 "The widest instructions of the CPU that may be used: auto (all that it has), portable, avx2, avx512, "
                 "avx512_bf16 or amx");
  app.add_option(kAttention,
                 "Attention over packed sequences on a GPU: auto (flash), flash, or cudnn (where it serves)");
  app.add_option(kNuma,
                 "Memory on a machine with several NUMA nodes and no GPU: auto (near each process), off, or a folder "
                 "to read in place of /sys/devices/system/node");
}

void choose_machine(const CLI::App& app, const MachineKeys& keys) {
  const auto path = given(app, kCpuPath), attention = given(app, kAttention);
  kernels::allow_cpu_path(path.value_or(keys.cpu_path), path ? kCpuPath : "model.cpu_path");
  kernels::prefer_device_attention(attention.value_or(keys.attention), attention ? kAttention : "model.attention");
  if (const std::string done = choose_memory(given(app, kNuma).value_or(keys.numa ? "auto" : "off")); !done.empty())
    log::debug(done);
}

void check_launched(const CLI::App& app) {
  for (const char* option : {kCpuPath, kAttention, kNuma})
    MOEGRAFT_CHECK_USAGE(!given(app, option), "launch: ", option,
                         " belongs to what is launched: moegraft launch --nproc 2 -- ", option, " ",
                         *given(app, option), " train -c run.yaml");
}

void refuse_old_variables() {
  for (const Variable& v : kOldVariables) {
    const char* value = std::getenv(v.name);
    MOEGRAFT_CHECK_USAGE(!value || !*value, v.name, "=", value, " is no longer read: give ", v.option, " ", value,
                         " before the command, or ", v.key, " in a run's YAML, and unset it");
  }
}

}  // namespace moegraft::tools
