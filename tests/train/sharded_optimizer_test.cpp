// AdamW whose state is split over processes: the values of the unsharded one, bit for bit; the norm of gradients that
// are spread.

#include "libtorch.h"

#include <gtest/gtest.h>

#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/parallel/updates.h"
#include "moegraft/train/optimizer.h"
#include "support/ranks/ranks.h"

namespace moegraft::train {
namespace {

using model::ParameterRegistry;

const std::map<std::string, GroupOptions> kGroups{{"lora", {1e-2, 0.1}}, {"embeddings", {3e-2, 0.0}}};

// Odd sizes, one that travels alone, one without a gradient, expert parameters of which expert index e holds the rows
// [2e, 2e + 2).
void fill(ParameterRegistry& registry, int64_t expert_index, int64_t expert_size) {
  uint64_t seed = 1;
  const auto add = [&](const std::string& name, at::IntArrayRef shape, const std::string& group, bool expert = false) {
    auto g = at::make_generator<at::CPUGeneratorImpl>(seed++);
    at::Tensor t = at::randn(shape, g, at::kFloat);
    const int64_t rows = shape.empty() ? 0 : shape[0];
    if (expert) t = t.narrow(0, expert_index * rows / expert_size, rows / expert_size).clone();
    registry.add({.name = name,
                  .tensor = t.requires_grad_(true),
                  .group = group,
                  .sharding = expert ? model::Sharding::expert : model::Sharding::replicated,
                  .first_row = expert ? expert_index * rows / expert_size : 0,
                  .total_rows = expert && expert_size > 1 ? rows : 0});
  };
  add("rows", {2100, 2048}, "embeddings");
  add("norm", {7}, "lora");
  for (int l = 0; l < 3; ++l) {
    const std::string prefix = "layers." + std::to_string(l) + ".";
    add(prefix + "q.A", {5, 33}, "lora");
    add(prefix + "q.B", {256, 5}, "lora");
    add(prefix + "gate.A", {4, 3, 512}, "lora", true);
    add(prefix + "gate.B", {4, 17, 3}, "lora", true);
  }
  add("never", {3, 3}, "lora");
}

// Of step s, for the whole parameter; the same on every rank.
void give_gradients(ParameterRegistry& registry, int64_t s) {
  for (size_t i = 0; i < registry.all().size(); ++i) {
    const auto& p = registry.all()[i];
    p.tensor.mutable_grad().reset();
    if (p.name == "never" || (s == 1 && i % 3 == 1)) continue;
    auto g = at::make_generator<at::CPUGeneratorImpl>(uint64_t(100 * s + int64_t(i)));
    std::vector<int64_t> shape = p.tensor.sizes().vec();
    if (p.total_rows > 0) shape[0] = p.total_rows;
    at::Tensor grad = at::randn(shape, g, at::kFloat);
    if (p.total_rows > 0) grad = grad.narrow(0, p.first_row, p.tensor.size(0)).clone();
    p.tensor.mutable_grad() = grad;
  }
}

RANK_BODY(sharded_adamw) {
  at::set_num_threads(1);
  const auto world =
      distributed::World::join(distributed::read_launch_environment(), {.timeout = std::chrono::seconds(30)});
  for (int64_t ep = 1; ep <= world->size(); ep *= 2)
    for (const bool in_8bit : {false, true}) {
      const auto mesh = distributed::make_mesh(world, ep);
      ParameterRegistry here, there;
      fill(here, mesh.expert->rank(), ep);
      fill(there, mesh.expert->rank(), ep);
      const AdamWOptions options{0.9, 0.95, 1e-8, in_8bit};
      const parallel::UpdateSharding sharding(here, mesh);
      AdamW split(here, kGroups, options, sharding.owned()), plain(there, kGroups, options);
      EXPECT_LT(split.state_bytes(), plain.state_bytes());
      for (int64_t s = 0; s < 4; ++s) {
        give_gradients(here, s);
        give_gradients(there, s);
        split.step(1.0, s == 2 ? 0.25 : 1.0);
        sharding.share();
        plain.step(1.0, s == 2 ? 0.25 : 1.0);
        for (size_t i = 0; i < here.all().size(); ++i)
          EXPECT_TRUE(at::equal(here.all()[i].tensor, there.all()[i].tensor))
              << here.all()[i].name << " after step " << s << " on rank " << world->rank();
        if (s != 1) continue;  // the whole state, as a checkpoint gives it, goes to whoever owns what
        io::TensorMap state = plain.state();
        for (auto& [name, tensor] : state) tensor = tensor.clone();
        AdamW other(here, kGroups, options, sharding.owned());
        if (ep == 1) {
          other.load_state(state);
          for (const auto& [name, tensor] : split.state())
            EXPECT_TRUE(at::equal(tensor, other.state().at(name))) << name;
          state["layers.9.q.A.step"] = at::zeros({});
          EXPECT_THROW(other.load_state(state), UserError);
        }
      }
      // Every parameter's state is somewhere exactly once per group; the parts are written by whoever has them.
      at::Tensor owned = at::zeros({int64_t(here.all().size())}, at::kLong);
      for (size_t i = 0; i < here.all().size(); ++i) owned[int64_t(i)] = int64_t(sharding.owned()[i]);
      world->all().all_reduce(owned, "owners").wait();
      for (size_t i = 0; i < here.all().size(); ++i)
        EXPECT_EQ(owned[int64_t(i)].item<int64_t>(), here.all()[i].sharding == model::Sharding::expert ? ep : 1)
            << here.all()[i].name;
      for (const auto& part : split.state_parts())
        EXPECT_EQ(part.copies == checkpoint::Copies::nowhere, part.name != "steps") << part.name;

      // The norm: each parameter once, wherever it is, the same bits everywhere.
      give_gradients(here, 5);
      ParameterRegistry whole;
      fill(whole, 0, 1);
      give_gradients(whole, 5);
      const double norm = global_grad_norm(here, mesh.expert.get()), expected = global_grad_norm(whole);
      EXPECT_NEAR(norm, expected, 1e-12 * expected);
      at::Tensor norms = at::empty({world->size()}, at::kDouble);
      world->all().all_gather(norms, at::full({1}, norm, at::kDouble), "norms").wait();
      for (int64_t r = 0; r < world->size(); ++r) EXPECT_EQ(norms[r].item<double>(), norm);
    }
  world->all().barrier("end");
}
TEST(ShardedAdamW, TwoRanksUpdateAsOne) { testing::run_ranks("sharded_adamw", 2); }
TEST(ShardedAdamW, FourRanksUpdateAsOne) { testing::run_ranks("sharded_adamw", 4); }

}  // namespace
}  // namespace moegraft::train
