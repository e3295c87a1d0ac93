// Gradients summed over processes: against the sums written down, and against one process's.

#include "libtorch.h"

#include <gtest/gtest.h>

#include <functional>

#include "join.h"
#include "moegraft/base/check.h"
#include "moegraft/parallel/gradients.h"
#include "moegraft/parallel/updates.h"

namespace moegraft::parallel {
namespace {

using distributed::Mesh;
using distributed::World;
using model::ParameterRegistry;

constexpr int64_t kLayers = 4, kMicroBatches = 3;

at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }
at::Tensor leaf(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, generator(seed), at::kFloat).requires_grad_(true);
}

void fill(ParameterRegistry& registry) {
  registry.add({"rows.image.embedding", leaf({37, 5}, 1), "embeddings"});
  registry.add({"unused", leaf({3}, 2), "lora"});
  for (int64_t l = 0; l < kLayers; ++l) {
    const std::string prefix = "adapters.0.layers." + std::to_string(l) + ".";
    registry.add({.name = prefix + "q.A", .tensor = leaf({2, 7}, uint64_t(10 + l)), .group = "lora", .layer = l});
    registry.add({.name = prefix + "gate.A",
                  .tensor = leaf({2, 3, 5}, uint64_t(20 + l)),
                  .group = "lora",
                  .layer = l,
                  .sharding = model::Sharding::expert});
  }
}
// Whether rank r's micro-batch m uses parameter i.
bool uses(size_t i, int64_t r, int64_t m, const std::string& name) {
  return name != "unused" && (int64_t(i) + r + m) % 3 != 0 && !(i == 4 && r != 0);
}
// The gradient it then has: d/dp of sum(c * p).
at::Tensor coefficient(const at::Tensor& p, size_t i, int64_t r, int64_t m) {
  return at::randn(p.sizes(), generator(uint64_t(1000 * int64_t(i) + 10 * r + m)), at::kFloat);
}

// One step; idle: this rank has nothing to train.
void step(ParameterRegistry& registry, GradientReducer& reducer, int64_t rank,
          const std::function<bool(int64_t)>& idle) {
  reducer.begin_step();
  for (int64_t m = 0; m < kMicroBatches; ++m) {
    if (m + 1 == kMicroBatches) reducer.last_backward();
    at::Tensor loss = at::zeros({});
    for (size_t i = 0; i < registry.all().size(); ++i) {
      const auto& p = registry.all()[i];
      if (!idle(rank) && uses(i, rank, m, p.name)) loss = loss + (p.tensor * coefficient(p.tensor, i, rank, m)).sum();
    }
    if (loss.requires_grad()) loss.backward();
  }
  reducer.finish();
}

void check(const ParameterRegistry& registry, const Mesh& mesh, const std::function<bool(int64_t)>& idle) {
  for (size_t i = 0; i < registry.all().size(); ++i) {
    const auto& p = registry.all()[i];
    at::Tensor sum;
    for (int64_t r = 0; r < mesh.world->size(); ++r) {
      if (p.sharding == model::Sharding::expert && r % mesh.expert_size() != mesh.expert->rank()) continue;
      for (int64_t m = 0; m < kMicroBatches; ++m)
        if (!idle(r) && uses(i, r, m, p.name))
          sum = (sum.defined() ? sum : at::zeros(p.tensor.sizes(), at::kDouble)) +
                coefficient(p.tensor, i, r, m).to(at::kDouble);
    }
    ASSERT_EQ(p.tensor.grad().defined(), sum.defined()) << p.name << " on rank " << mesh.world->rank();
    if (sum.defined()) {
      EXPECT_LE((p.tensor.grad().to(at::kDouble) - sum).abs().max().item<double>(),
                1e-6 * sum.abs().max().item<double>())
          << p.name << " on rank " << mesh.world->rank();
    }
  }
}

RANK_BODY(reducer) {
  const auto world = testing::join();
  const std::function<bool(int64_t)> nobody = [](int64_t) { return false; }, second = [](int64_t r) { return r == 1; },
                                     everybody = [](int64_t) { return true; };
  for (int64_t ep = 1; ep <= world->size(); ep *= 2) {
    const Mesh mesh = distributed::make_mesh(world, ep);
    std::vector<std::vector<at::Tensor>> bits;
    for (const int64_t bucket : {1, 300, 1 << 20}) {
      ParameterRegistry registry;
      fill(registry);
      {
        GradientReducer reducer(registry, mesh, bucket);
        if (bucket == 1) { EXPECT_EQ(reducer.num_buckets(), int64_t(registry.all().size())); }
        if (bucket == 1 << 20) { EXPECT_EQ(reducer.num_buckets(), 2); }
        for (int round = 0; round < 3; ++round) {
          step(registry, reducer, world->rank(), nobody);
          check(registry, mesh, nobody);
          if (round != 1) continue;
          step(registry, reducer, world->rank(), second);
          check(registry, mesh, second);
          step(registry, reducer, world->rank(), everybody);
          check(registry, mesh, everybody);
        }
        if (world->size() == 2) {  // sums of two: their bits cannot depend on the buckets
          bits.emplace_back();
          for (const auto& p : registry.all())
            bits.back().push_back(p.tensor.grad().defined() ? p.tensor.grad().clone() : at::Tensor());
        }
        // Every rank has the same bits, or an update would part them.
        for (const auto& p : registry.all()) {
          if (p.sharding == model::Sharding::expert || !p.tensor.grad().defined()) continue;
          at::Tensor all = at::empty({world->size() * p.tensor.numel()});
          world->all().all_gather(all, p.tensor.grad().reshape({-1}), "test").wait();
          for (int64_t r = 0; r < world->size(); ++r)
            EXPECT_TRUE(at::equal(all.view({world->size(), -1})[r], p.tensor.grad().reshape({-1})));
        }
      }
      // Without the reducer the parameters are ordinary again.
      registry.zero_grad();
      registry.all()[0].tensor.sum().backward();
      EXPECT_TRUE(at::equal(registry.all()[0].tensor.grad(), at::ones({37, 5})));
    }
    for (size_t b = 1; b < bits.size(); ++b)
      for (size_t i = 0; i < bits[b].size(); ++i) {
        ASSERT_EQ(bits[b][i].defined(), bits[0][i].defined());
        if (!bits[b][i].defined()) continue;
        EXPECT_TRUE(at::equal(bits[b][i], bits[0][i]));
      }
  }
  world->all().barrier("end");
}
TEST(GradientReducer, SumsOverTwoRanks) { testing::run_ranks("reducer", 2); }
TEST(GradientReducer, SumsOverFourRanksInEveryMesh) { testing::run_ranks("reducer", 4); }

// A net of four layers on a batch that is shared out: gradients of one process, buckets under way before the backward
// pass ends.
RANK_BODY(reducer_net) {
  const auto world = testing::join();
  const Mesh mesh = distributed::make_mesh(world, 1);
  const auto net = [](ParameterRegistry& registry) {
    for (int64_t l = 0; l < kLayers; ++l)
      registry.add({.name = "layers." + std::to_string(l) + ".weight",
                    .tensor = leaf({16, 16}, uint64_t(l)),
                    .group = "base",
                    .layer = l});
  };
  const auto loss = [](
                        const ParameterRegistry& registry, at::Tensor x,
                        const std::function<void()>& before_the_first = [] {}) {
    for (int64_t l = 0; l < kLayers; ++l) x = at::tanh(at::linear(x, registry.all()[size_t(l)].tensor));
    return x.square().sum();
  };
  const at::Tensor x = at::randn({8 * world->size(), 16}, generator(9), at::kFloat);
  ParameterRegistry whole, shared;
  net(whole);
  net(shared);
  loss(whole, x).backward();
  GradientReducer reducer(shared, mesh, 1);  // a bucket per layer
  reducer.begin_step();
  reducer.last_backward();
  reducer.take_traffic();
  loss(shared, x.narrow(0, 8 * world->rank(), 8)).backward();
  EXPECT_EQ(reducer.take_traffic().calls, kLayers) << "every bucket had started by the end of the backward pass";
  reducer.finish();
  EXPECT_EQ(reducer.take_traffic().calls, 1) << "only the flags";
  for (size_t i = 0; i < whole.all().size(); ++i) {
    const at::Tensor want = whole.all()[i].tensor.grad();
    EXPECT_LE((shared.all()[i].tensor.grad() - want).abs().max().item<double>(),
              1e-6 * want.abs().max().item<double>());
  }
  // Micro-batches before the last communicate nothing.
  reducer.begin_step();
  loss(shared, x.narrow(0, 8 * world->rank(), 4)).backward();
  EXPECT_EQ(reducer.take_traffic().calls, 0);
  reducer.last_backward();
  loss(shared, x.narrow(0, 8 * world->rank() + 4, 4)).backward();
  reducer.finish();
  for (size_t i = 0; i < whole.all().size(); ++i) {
    const at::Tensor want = whole.all()[i].tensor.grad();
    EXPECT_LE((shared.all()[i].tensor.grad() - want).abs().max().item<double>(),
              1e-6 * want.abs().max().item<double>());
  }
  world->all().barrier("end");
}
TEST(GradientReducer, GivesOneProcessesGradients) { testing::run_ranks("reducer_net", 2); }

// Buckets in bf16: each rank's micro-batches rounded as they are added, the sum over ranks in float32 and rounded once.
// More buckets than may be under way.
RANK_BODY(narrow_reducer) {
  const auto world = testing::join();
  for (int64_t ep = 1; ep <= world->size(); ep *= 2) {
    const Mesh mesh = distributed::make_mesh(world, ep);
    ParameterRegistry registry;
    fill(registry);
    GradientReducer reducer(registry, mesh, 1, at::kBFloat16);
    ASSERT_GT(reducer.num_buckets(), 2 * int64_t(GradientReducer::kUnderWay));
    for (int round = 0; round < 2; ++round) {
      step(registry, reducer, world->rank(), [](int64_t) { return false; });
      for (size_t i = 0; i < registry.all().size(); ++i) {
        const auto& p = registry.all()[i];
        at::Tensor sum;
        for (int64_t r = 0; r < world->size(); ++r) {
          if (p.sharding == model::Sharding::expert && r % ep != mesh.expert->rank()) continue;
          at::Tensor mine = at::zeros(p.tensor.sizes(), at::kBFloat16);
          bool any = false;
          for (int64_t m = 0; m < kMicroBatches; ++m)
            if (uses(i, r, m, p.name))
              mine = (mine.to(at::kFloat) + coefficient(p.tensor, i, r, m)).to(at::kBFloat16), any = true;
          if (any) sum = sum.defined() ? sum + mine.to(at::kFloat) : mine.to(at::kFloat);
        }
        ASSERT_EQ(p.tensor.grad().defined(), sum.defined()) << p.name;
        if (!sum.defined()) continue;
        EXPECT_EQ(p.tensor.grad().scalar_type(), at::kBFloat16);
        // One rounding, 2^-8 of the sum itself, however its addends cancel; and the order of float32 sums of four.
        const at::Tensor error = (p.tensor.grad().to(at::kFloat) - sum).abs(),
                         bound = sum.abs() * (1.0 / 256) + sum.abs().max() * 1e-6;
        EXPECT_TRUE((error <= bound).all().item<bool>()) << p.name;
      }
    }
  }
  world->all().barrier("end");
}
TEST(GradientReducer, SumsBf16BucketsInFloat32) {
  testing::run_ranks("narrow_reducer", 2);
  testing::run_ranks("narrow_reducer", 4);
}

TEST(GradientReducer, RefusesWhatWouldBeLost) {
  const Mesh mesh = distributed::make_mesh(World::join({}), 1);
  ParameterRegistry registry;
  registry.add({"w", leaf({4}, 1), "base"});
  GradientReducer reducer(registry, mesh, 100);
  const at::Tensor w = registry.all()[0].tensor;
  reducer.begin_step();
  reducer.last_backward();
  w.sum().backward();
  EXPECT_THROW(w.sum().backward(), InvariantError);
  reducer.finish();
  reducer.begin_step();
  reducer.finish();
  EXPECT_FALSE(w.grad().defined());
  registry.set_trainable("w", false);
  EXPECT_THROW(reducer.begin_step(), InvariantError);
}

// Owners by size, and their values everywhere.
RANK_BODY(updates) {
  const auto world = testing::join();
  for (int64_t ep = 1; ep <= world->size(); ep *= 2) {
    const Mesh mesh = distributed::make_mesh(world, ep);
    ParameterRegistry registry;
    fill(registry);
    const UpdateSharding sharding(registry, mesh);
    int64_t mine = 0, total = 0, largest = 0;
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < registry.all().size(); ++i) {
      const auto& p = registry.all()[i];
      if (sharding.owned()[i]) mine += p.tensor.numel();
      total += p.tensor.numel();
      largest = std::max(largest, p.tensor.numel());
      if (i % 4 != 3) p.tensor.mutable_grad() = at::zeros_like(p.tensor);
      p.tensor.fill_(-1.0);
      if (sharding.owned()[i])
        p.tensor.fill_(double(100 * int64_t(i) + (p.sharding == model::Sharding::expert ? mesh.expert->rank() : 0)));
    }
    EXPECT_LE(mine, total / std::min(world->size(), mesh.data_size()) + largest);
    sharding.share();
    for (size_t i = 0; i < registry.all().size(); ++i) {
      const auto& p = registry.all()[i];
      const double owners =
          double(100 * int64_t(i) + (p.sharding == model::Sharding::expert ? mesh.expert->rank() : 0));
      const double want = i % 4 != 3 || sharding.owned()[i]
                              ? owners
                              : -1.0;  // without a gradient nothing has changed, and nothing travels
      EXPECT_TRUE(p.tensor.eq(want).all().item<bool>()) << p.name;
    }
  }
  world->all().barrier("end");
}
TEST(UpdateSharding, OwnersValuesReachEverybody) {
  testing::run_ranks("updates", 2);
  testing::run_ranks("updates", 4);
}

}  // namespace
}  // namespace moegraft::parallel
