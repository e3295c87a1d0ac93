#pragma once
// Machines whose memory is not equally near to all of their cores.

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace moegraft {

struct NumaNode {
  int id = 0;
  std::vector<int> cpus;
};

// The nodes on which this process may run (its affinity: taskset, cpusets, a launcher's binding), each with those of
// its CPUs. Empty where the kernel does not say.
std::vector<NumaNode> usable_numa_nodes(const std::filesystem::path& sysfs = "/sys/devices/system/node");

// The nodes [first, last) of process `index` of `count` on a machine: processes share nodes, or nodes processes, as
// evenly as can be and in order.
std::pair<int64_t, int64_t> numa_share(int64_t num_nodes, int64_t index, int64_t count);

// Several processes on several nodes: runs this one on its share of them, so that what it touches first is near. Left
// with several nodes, spreads its pages over them, for any thread may read any weight. What was arranged before
// (numactl, a binding to one node) stands. Call before memory is touched and threads are made. Returns what it did,
// empty: nothing was to be done.
std::string arrange_numa(int64_t local_rank, int64_t local_world_size,
                         const std::filesystem::path& sysfs = "/sys/devices/system/node");

}  // namespace moegraft
