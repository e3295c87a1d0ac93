// The writer over the store of a real world: four processes, two of data times two of experts.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "libtorch.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/distributed/world.h"
#include "support/ranks/ranks.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

at::Tensor experts(int64_t step) { return at::arange(4 * 6, at::kFloat).reshape({4, 6}) + double(step); }
at::Tensor rows(int64_t step) { return at::full({5, 3}, double(step)); }

struct Rank {
  Rank()
      : world(distributed::World::join(distributed::read_launch_environment(), {.timeout = std::chrono::seconds(20)})),
        mesh(make_mesh(world, world->size() / 2)) {
    const int64_t size = mesh.expert_size(), n = 4 / size;
    model::Parameter p{"experts", at::zeros({n, 6}).requires_grad_(true), "lora"};
    if (size > 1) p.first_row = mesh.expert->rank() * n, p.total_rows = 4;
    registry.add(p);
    registry.add({"rows", at::zeros({5, 3}).requires_grad_(true), "embeddings"});
  }
  void set(int64_t step) {
    at::NoGradGuard no_grad;
    const auto& e = registry.all()[0];
    e.tensor.detach().copy_(experts(step).narrow(0, e.first_row, e.tensor.size(0)));
    registry.all()[1].tensor.detach().copy_(rows(step));
  }
  Parts parts() const { return parts_to_write(parameter_parts(registry), place_in(mesh)); }
  std::shared_ptr<distributed::World> world;
  distributed::Mesh mesh;
  model::ParameterRegistry registry;
};

RANK_BODY(saves_and_resumes) {
  const fs::path root = moegraft::testing::rank_argument();
  Rank rank;
  {
    CheckpointWriter writer(root, {.every = 1, .keep = 2}, true, rank.world);
    for (int64_t step = 1; step <= 3; ++step) {
      rank.set(step);
      writer.save(step, rank.parts(), {}, "{}");
      rank.set(-1);  // training goes on
    }
    writer.wait();
    EXPECT_TRUE(fs::exists(root / step_name(3))) << "published when wait() returns, on every rank";
  }
  const auto loaded = load(*find_latest(root));
  EXPECT_TRUE(at::equal(loaded.parameters.at("experts"), experts(3)));
  load_parameters(rank.registry, loaded.parameters);
  const auto& e = rank.registry.all()[0];
  EXPECT_TRUE(at::equal(e.tensor, experts(3).narrow(0, e.first_row, e.tensor.size(0))));
  EXPECT_TRUE(at::equal(rank.registry.all()[1].tensor, rows(3)));
  rank.world->all().barrier("end");
}

RANK_BODY(last_rank_dies) {
  const fs::path root = moegraft::testing::rank_argument();
  Rank rank;
  CheckpointWriter writer(root, {}, true, rank.world);
  writer.save(4, rank.parts(), {}, "{}");
  writer.wait();
  rank.world->all().barrier("saved");
  if (rank.world->rank() == rank.world->size() - 1) kill(getpid(), SIGKILL);
  writer.save(5, rank.parts(), {}, "{}");
  // The training's next collective fails soon after; the writer is destroyed on the way out.
}

class WorldTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("moegraft_world_checkpoint_" + std::to_string(getpid()));
    fs::remove_all(root_);
  }
  void TearDown() override { fs::remove_all(root_); }
  fs::path root_;
};

TEST_F(WorldTest, FourProcessesSaveAndResume) {
  moegraft::testing::run_ranks("saves_and_resumes", 4, root_.string());
  EXPECT_EQ(list_checkpoints(root_).size(), 2u);
  EXPECT_TRUE(fs::exists(root_ / step_name(3) / "adapter-00003-of-00004.safetensors"));
  EXPECT_TRUE(at::equal(load(root_ / step_name(3)).parameters.at("rows"), rows(3)));
}

TEST_F(WorldTest, ADeadRankLeavesTheCheckpointBefore) {
  moegraft::testing::Ranks ranks("last_rank_dies", 2, root_.string());
  const auto results = ranks.wait();
  EXPECT_EQ(results[1].signal, SIGKILL);
  EXPECT_EQ(results[0].code, 0) << results[0].err;
  EXPECT_NE(results[0].err.find("rank 1 did not finish writing"), std::string::npos) << results[0].err;
  EXPECT_EQ(find_latest(root_)->filename(), "step-00000004");
  EXPECT_EQ(list_checkpoints(root_).size(), 1u);
}

}  // namespace
}  // namespace moegraft::checkpoint
