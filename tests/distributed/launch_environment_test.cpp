#include <gtest/gtest.h>

#include <map>

#include "moegraft/base/check.h"
#include "moegraft/distributed/launch.h"

namespace moegraft::distributed {
namespace {

using Variables = std::map<std::string, std::string>;

LaunchEnvironment read(const Variables& variables) {
  return read_launch_environment([&](const char* name) -> std::optional<std::string> {
    const auto it = variables.find(name);
    return it == variables.end() ? std::nullopt : std::optional(it->second);
  });
}

std::string error_of(const Variables& variables) {
  try {
    read(variables);
  } catch (const UsageError& e) { return e.what(); }
  return "no error";
}

Variables with(Variables base, const Variables& changes) {
  for (const auto& [name, value] : changes) base[name] = value;
  return base;
}

const Variables kTorchrun = {{"RANK", "5"},
                             {"WORLD_SIZE", "8"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "4"},
                             {"MASTER_ADDR", "host7"},
                             {"MASTER_PORT", "4242"},
                             {"TORCHELASTIC_RESTART_COUNT", "2"},
                             {"TORCHELASTIC_USE_AGENT_STORE", "True"}};
const Variables kSlurm = {{"SLURM_PROCID", "6"},
                          {"SLURM_LOCALID", "2"},
                          {"SLURM_NODEID", "1"},
                          {"SLURM_STEP_ID", "0"},
                          {"SLURM_STEP_NUM_TASKS", "9"},
                          {"SLURM_STEP_TASKS_PER_NODE", "4(x2),1"},
                          {"SLURM_STEP_NODELIST", "node[03-05,9],x1"},
                          {"SLURM_JOB_ID", "1234567"}};
const Variables kOpenMpi = {{"OMPI_COMM_WORLD_SIZE", "4"},
                            {"OMPI_COMM_WORLD_RANK", "3"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "3"}};

TEST(LaunchEnvironment, NoneIsOneProcess) {
  const auto e = read({});
  EXPECT_EQ(e.launcher, "none");
  EXPECT_FALSE(e.distributed());
  EXPECT_EQ(e.rank, 0);
  EXPECT_EQ(e.world_size, 1);
}

TEST(LaunchEnvironment, Torchrun) {
  const auto e = read(kTorchrun);
  EXPECT_EQ(e.launcher, "torchrun");
  EXPECT_EQ(e.rank, 5);
  EXPECT_EQ(e.world_size, 8);
  EXPECT_EQ(e.local_rank, 1);
  EXPECT_EQ(e.local_world_size, 4);
  EXPECT_EQ(e.master_address, "host7");
  EXPECT_EQ(e.master_port, 4242);
  EXPECT_EQ(e.restart, 2);
  EXPECT_TRUE(e.agent_store);
  EXPECT_FALSE(read(with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}})).agent_store);
  EXPECT_EQ(read(with(kSlurm, kTorchrun)).launcher, "torchrun");  // srun torchrun …
}

TEST(LaunchEnvironment, Slurm) {
  const auto e = read(kSlurm);
  EXPECT_EQ(e.launcher, "slurm");
  EXPECT_EQ(e.rank, 6);
  EXPECT_EQ(e.world_size, 9);
  EXPECT_EQ(e.local_rank, 2);
  EXPECT_EQ(e.local_world_size, 4);
  EXPECT_EQ(e.master_address, "node03");
  EXPECT_EQ(e.master_port, 20000 + 1234567 % 10000);
  EXPECT_FALSE(e.agent_store);
  EXPECT_EQ(read(with(kSlurm, {{"SLURM_PROCID", "8"}, {"SLURM_LOCALID", "0"}, {"SLURM_NODEID", "2"}})).local_world_size,
            1);
  EXPECT_EQ(read(with(kSlurm, {{"MASTER_ADDR", "elsewhere"}, {"MASTER_PORT", "99"}})).master_address, "elsewhere");
  EXPECT_EQ(read(with(kSlurm, {{"MASTER_PORT", "99"}})).master_port, 99);
}

TEST(LaunchEnvironment, SlurmNodeLists) {
  const std::vector<std::pair<std::string, std::string>> cases = {{"node7", "node7"},
                                                                  {"a,b,c", "a"},
                                                                  {"node[03-05,9],x1", "node03"},
                                                                  {"n[1,5]", "n1"},
                                                                  {"n[007]", "n007"},
                                                                  {"x1,node[03-05]", "x1"},
                                                                  {"gpu[2-3]-ib", "gpu2-ib"},
                                                                  {"rack[1-2]node[04-06]", "rack1node04"},
                                                                  {"n[1-2].cluster.org,m", "n1.cluster.org"}};
  for (const auto& [list, first] : cases)
    EXPECT_EQ(read(with(kSlurm, {{"SLURM_STEP_NODELIST", list}})).master_address, first) << list;
  EXPECT_NE(error_of(with(kSlurm, {{"SLURM_STEP_NODELIST", "n[1-2"}})).find("no ']' in 'n[1-2'"), std::string::npos);
}

TEST(LaunchEnvironment, AnAllocationWithoutSrunIsOneProcess) {
  auto batch = kSlurm;  // what a batch script sees
  batch.erase("SLURM_STEP_ID");
  EXPECT_EQ(read(batch).launcher, "none");
  EXPECT_EQ(read(with(kSlurm, {{"SLURM_STEP_NUM_TASKS", "1"}})).world_size, 1);  // an interactive shell
}

TEST(LaunchEnvironment, OpenMpi) {
  const auto e = read(kOpenMpi);
  EXPECT_EQ(e.launcher, "openmpi");
  EXPECT_EQ(e.rank, 3);
  EXPECT_EQ(e.local_rank, 3);
  EXPECT_EQ(e.master_address, "127.0.0.1");
  EXPECT_NE(error_of(with(kOpenMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}}))
                .find("MASTER_ADDR is not set"),
            std::string::npos);
}

TEST(LaunchEnvironment, ErrorsNameTheVariable) {
  auto torchrun = [&](const Variables& changes) { return error_of(with(kTorchrun, changes)); };
  EXPECT_EQ(torchrun({{"RANK", "8"}}), "RANK must be a whole number in [0, 7], got '8' (set by torchrun)");
  EXPECT_EQ(torchrun({{"RANK", "-1"}}), "RANK must be a whole number in [0, 7], got '-1' (set by torchrun)");
  EXPECT_EQ(torchrun({{"WORLD_SIZE", "8x"}}).substr(0, 10), "WORLD_SIZE");
  EXPECT_EQ(torchrun({{"WORLD_SIZE", "99999999999999999999"}}).substr(0, 10), "WORLD_SIZE");
  EXPECT_EQ(torchrun({{"LOCAL_RANK", "4"}}).substr(0, 10), "LOCAL_RANK");
  EXPECT_EQ(torchrun({{"MASTER_PORT", "70000"}}).substr(0, 11), "MASTER_PORT");
  EXPECT_EQ(torchrun({{"MASTER_ADDR", ""}}).substr(0, 22), "MASTER_ADDR is not set");
  EXPECT_EQ(error_of({{"RANK", "0"}}).substr(0, 21), "WORLD_SIZE is not set");
  EXPECT_EQ(error_of({{"WORLD_SIZE", "2"}}).substr(0, 15), "RANK is not set");
  EXPECT_EQ(error_of(with(kSlurm, {{"SLURM_LOCALID", "4"}})).substr(0, 13), "SLURM_LOCALID");
  EXPECT_EQ(error_of(with(kOpenMpi, {{"OMPI_COMM_WORLD_RANK", "4"}})).substr(0, 20), "OMPI_COMM_WORLD_RANK");
}

}  // namespace
}  // namespace moegraft::distributed
