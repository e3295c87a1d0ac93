#include "moegraft/base/numa.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>

#include "moegraft/base/text.h"

namespace moegraft {
namespace {

bool parse(std::string_view text, int& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= 0;
}

// "0-3,8,10-11", the kernel's form of a set of CPUs. Empty when it is anything else.
std::vector<int> parse_cpus(const std::string& list) {
  std::vector<int> cpus;
  for (const std::string& part : split(trim(list), ',')) {
    const auto dash = part.find('-');
    int first = 0, last = 0;
    if (!parse(std::string_view(part).substr(0, dash), first)) return {};
    if (dash == std::string::npos)
      last = first;
    else if (!parse(std::string_view(part).substr(dash + 1), last) || last < first)
      return {};
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

bool somebody_chose_a_policy() {
  int mode = MPOL_DEFAULT;
  return syscall(SYS_get_mempolicy, &mode, nullptr, 0ul, nullptr, 0ul) == 0 && mode != MPOL_DEFAULT;
}

bool interleave(const std::vector<NumaNode>& nodes) {
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(size_t(nodes.back().id) / kBits + 1);
  for (const NumaNode& node : nodes) mask[size_t(node.id) / kBits] |= 1ul << (node.id % kBits);
  return syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, mask.data(), mask.size() * kBits + 1) == 0;
}

std::string names(const std::vector<NumaNode>& nodes) {
  std::vector<std::string> ids;
  for (const NumaNode& node : nodes) ids.push_back(std::to_string(node.id));
  return join(ids, ",");
}

}  // namespace

std::vector<NumaNode> usable_numa_nodes(const std::filesystem::path& sysfs) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
  std::vector<NumaNode> nodes;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(sysfs, error)) {
    const std::string name = entry.path().filename().string();
    NumaNode node;
    if (!name.starts_with("node") || !parse(std::string_view(name).substr(4), node.id)) continue;
    std::ifstream file(entry.path() / "cpulist");
    std::string list;
    std::getline(file, list);
    for (const int cpu : parse_cpus(list))
      if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed)) node.cpus.push_back(cpu);
    if (!node.cpus.empty()) nodes.push_back(std::move(node));
  }
  std::sort(nodes.begin(), nodes.end(), [](const NumaNode& a, const NumaNode& b) { return a.id < b.id; });
  return nodes;
}

std::pair<int64_t, int64_t> numa_share(int64_t num_nodes, int64_t index, int64_t count) {
  const int64_t first = index * num_nodes / count;
  return {first, std::max(first + 1, (index + 1) * num_nodes / count)};
}

std::string arrange_numa(int64_t local_rank, int64_t local_world_size, const std::filesystem::path& sysfs) {
  std::vector<NumaNode> nodes = usable_numa_nodes(sysfs);
  if (nodes.size() < 2 || local_rank < 0 || local_rank >= local_world_size || somebody_chose_a_policy()) return {};
  std::string done;
  if (local_world_size > 1) {
    const auto [first, last] = numa_share(int64_t(nodes.size()), local_rank, local_world_size);
    nodes = {nodes.begin() + first, nodes.begin() + last};
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (const NumaNode& node : nodes)
      for (const int cpu : node.cpus) CPU_SET(cpu, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus) == 0) done = "on NUMA node " + names(nodes);
  }
  if (nodes.size() > 1 && interleave(nodes))
    done += (done.empty() ? "" : ", ") + ("memory spread over NUMA nodes " + names(nodes));
  return done;
}

}  // namespace moegraft
