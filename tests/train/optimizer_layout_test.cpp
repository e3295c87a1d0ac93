// The optimizer's state over layouts: what the ranks of any expert parallelism write together is what one process
// writes, and either reads the other's.
#include <gtest/gtest.h>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/parts.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::train {
namespace {

struct Tensor {
  const char* name;
  std::vector<int64_t> shape;
  bool expert, in_8bit;
};
const Tensor kTensors[] = {
    {"blocks", {8, 4, 256}, true, true}, {"uneven", {8, 8, 80}, true, false},  // an expert has 2.5 blocks
    {"small", {8, 2, 16}, true, false},  {"whole", {40, 136}, false, true},    // its last block is not full
    {"norm", {64}, false, false},
};

at::Tensor values(const char* name, const char* purpose, std::vector<int64_t> shape) {
  Rng rng(3, std::string(name) + purpose);
  const at::Tensor x = at::empty(shape);
  for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<float>()[i] = float(rng.uniform() * 2 - 1);
  return x;
}

// One rank of `expert`; steps with the same gradients as every other layout.
struct Rank {
  Rank(int64_t expert, int64_t index) : expert(expert), index(index) {
    for (const auto& t : kTensors) {
      model::Parameter p{t.name, slice(t, values(t.name, "value", t.shape)).requires_grad_(true), "lora"};
      p.sharding = t.expert ? model::Sharding::expert : model::Sharding::replicated;
      if (t.expert && expert > 1) p.first_row = index * (t.shape[0] / expert), p.total_rows = t.shape[0];
      registry.add(p);
    }
    optimizer = std::make_unique<AdamW>(registry, std::map<std::string, GroupOptions>{{"lora", {0.1, 0.1}}},
                                        AdamWOptions{0.9, 0.95, 1e-8, true});
  }
  at::Tensor slice(const Tensor& t, const at::Tensor& x) const {
    const int64_t rows = t.shape[0] / expert;
    return t.expert ? x.narrow(0, index * rows, rows).clone() : x;
  }
  void step(int64_t n) {
    for (const auto& t : kTensors)
      if (std::string_view(t.name) != "small" || n != 1)  // a step without gradient
        registry.find(t.name)->tensor.mutable_grad() =
            slice(t, values(t.name, ("grad" + std::to_string(n)).c_str(), t.shape));
    optimizer->step(1.0);
    registry.zero_grad();
  }
  int64_t expert, index;
  model::ParameterRegistry registry;
  std::unique_ptr<AdamW> optimizer;
};

std::vector<std::unique_ptr<Rank>> ranks_of(int64_t expert) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int64_t i = 0; i < expert; ++i) ranks.push_back(std::make_unique<Rank>(expert, i));
  return ranks;
}

// As checkpoint::load() would give it back. Each row must come from exactly one rank's share.
io::TensorMap assembled(const std::vector<std::unique_ptr<Rank>>& ranks) {
  io::TensorMap tensors;
  std::map<std::string, int64_t> next;
  const auto size = int64_t(ranks.size());
  for (int64_t r = 0; r < size; ++r)
    for (const auto& part : checkpoint::parts_to_write(ranks[r]->optimizer->state_parts(), {r, size, 0, 1})) {
      if (part.total_rows == 0) {
        EXPECT_FALSE(tensors.contains(part.name)) << part.name;
        tensors[part.name] = part.tensor.clone();
        continue;
      }
      auto& whole = tensors[part.name];
      auto shape = part.tensor.sizes().vec();
      shape[0] = part.total_rows;
      if (!whole.defined()) whole = at::empty(shape, part.tensor.options());
      EXPECT_EQ(part.first_row, next[part.name]) << part.name;
      whole.narrow(0, part.first_row, part.tensor.size(0)).copy_(part.tensor);
      next[part.name] += part.tensor.size(0);
    }
  for (const auto& [name, rows] : next) EXPECT_EQ(rows, tensors.at(name).size(0)) << name;
  return tensors;
}

void expect_equal(const io::TensorMap& a, const io::TensorMap& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) {
    ASSERT_TRUE(b.contains(name)) << name;
    EXPECT_TRUE(at::equal(tensor, b.at(name))) << name;
  }
}

TEST(OptimizerLayout, TheFormDoesNotDependOnTheLayout) {
  for (const int64_t expert : {1, 2, 4, 8})
    for (const auto& rank : ranks_of(expert))
      for (const auto& t : kTensors)
        EXPECT_EQ(suits_8bit(*rank->registry.find(t.name)), t.in_8bit) << t.name << ", expert " << expert;
}

TEST(OptimizerLayout, EveryLayoutWritesAndReadsTheSameState) {
  const auto one = ranks_of(1);
  for (int64_t n = 0; n < 3; ++n) one[0]->step(n);
  const auto expected = one[0]->optimizer->state();
  EXPECT_EQ(expected.at("small.step").item<float>(), 2);
  expect_equal(assembled(one), expected);
  for (const int64_t expert : {2, 4, 8}) {
    SCOPED_TRACE(expert);
    const auto ranks = ranks_of(expert);
    for (const auto& rank : ranks)
      for (int64_t n = 0; n < 3; ++n) rank->step(n);
    const auto written = assembled(ranks);
    expect_equal(written, expected);
    // From one process to many, from many to one, and on.
    const auto fresh = ranks_of(expert), alone = ranks_of(1);
    for (const auto& rank : fresh) rank->optimizer->load_state(expected);
    expect_equal(assembled(fresh), expected);
    alone[0]->optimizer->load_state(written);
    expect_equal(alone[0]->optimizer->state(), expected);
  }
}

TEST(OptimizerLayout, AStateOfOtherRowsIsRefused) {
  const auto two = ranks_of(2);
  auto state = ranks_of(1)[0]->optimizer->state();
  for (const char* name : {"blocks.exp_avg.codes", "blocks.exp_avg.scales", "uneven.exp_avg"}) {
    auto damaged = state;
    damaged[name] = damaged.at(name).narrow(0, 0, 4);
    EXPECT_THROW(two[1]->optimizer->load_state(damaged), UserError) << name;
  }
}

}  // namespace
}  // namespace moegraft::train
