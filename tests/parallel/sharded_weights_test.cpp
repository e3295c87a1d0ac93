// Experts split over processes: the bits of the whole.

#include "libtorch.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "../support/paths.h"
#include "join.h"
#include "moegraft/base/check.h"
#include "moegraft/model/decoder.h"
#include "moegraft/parallel/dispatcher.h"
#include "moegraft/parallel/sharded_weights.h"

namespace moegraft::parallel {
namespace {

using distributed::Mesh;
using model::ExpertWeights;

// Only its dtype and device count.
class Nothing : public model::WeightProvider {
 public:
  explicit Nothing(at::ScalarType dtype) : dtype_(dtype) {}
  kernels::Matrix embedding_VD() override { return {}; }
  kernels::Matrix head_VD() override { return {}; }
  at::Tensor final_norm_D() override { return {}; }
  model::LayerWeights layer(int64_t) override { return {}; }
  ExpertWeights experts(int64_t, int64_t, int64_t) override { return {}; }
  at::ScalarType dtype() const override { return dtype_; }
  at::Device device() const override { return at::kCPU; }

 private:
  at::ScalarType dtype_;
};

ExpertWeights draw(int64_t first, int64_t count, int64_t F, int64_t D, int64_t layer, at::ScalarType dtype) {
  ExpertWeights w;
  w.first = first;
  for (int64_t e = first; e < first + count; ++e) {
    auto g = at::make_generator<at::CPUGeneratorImpl>(uint64_t(100 * layer + e));
    w.gate_FD.push_back(at::randn({F, D}, g, at::kFloat).to(dtype));
    w.up_FD.push_back(at::randn({F, D}, g, at::kFloat).to(dtype));
    w.down_DF.push_back(at::randn({D, F}, g, at::kFloat).to(dtype));
  }
  return w;
}

bool same(const ExpertWeights& a, const ExpertWeights& b) {
  bool equal = a.first == b.first && a.count() == b.count();
  for (int64_t e = 0; equal && e < a.count(); ++e)
    equal = at::equal(a.gate_FD[size_t(e)], b.gate_FD[size_t(e)]) &&
            at::equal(a.up_FD[size_t(e)], b.up_FD[size_t(e)]) && at::equal(a.down_DF[size_t(e)], b.down_DF[size_t(e)]);
  return equal;
}

RANK_BODY(sharded_weights) {
  const auto world = testing::join();
  constexpr int64_t L = 5, E = 4;
  for (int64_t ep = 1; ep <= world->size(); ep *= 2)
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const Mesh mesh = distributed::make_mesh(world, ep);
      const int64_t count = E / ep, first = mesh.expert->rank() * count;
      ShardedWeights weights(std::make_shared<Nothing>(dtype), mesh);
      const auto layer = [&](int64_t l) {
        return draw(first, l == 2 ? 0 : count, l == 3 ? 5 : 3, 7, l, dtype);
      };  // one dense, one larger, sizes that leave a rest
      int64_t bytes = 0;
      for (int64_t l = 0; l < L; ++l) {
        const ExpertWeights w = layer(l);
        weights.add_layer(w);
        for (const auto* list : {&w.gate_FD, &w.up_FD, &w.down_DF})
          for (const auto& t : *list) bytes += int64_t(t.nbytes());
      }
      EXPECT_TRUE(weights.transient());
      EXPECT_LE(weights.resident_bytes(), bytes / mesh.data_size() + L * 4);
      const auto visit = [&](int64_t l, int64_t next) {
        weights.prefetch(next);
        if (l == 2) return;
        EXPECT_TRUE(same(weights.experts(l, first, count), layer(l))) << "layer " << l;
        const ExpertWeights part = weights.experts(l, first + count - 1, 1);
        EXPECT_TRUE(at::equal(part.down_DF[0], layer(l).down_DF.back()));
      };
      for (int round = 0; round < 2; ++round) {
        for (int64_t l = 0; l < L; ++l) visit(l, l + 1);
        for (int64_t l = L - 1; l >= 0; --l) visit(l, l - 1);
      }
      EXPECT_EQ(weights.traffic().replaced, 0);
      EXPECT_EQ(weights.traffic().late, 1);
      EXPECT_EQ(weights.take_traffic().bytes > 0, mesh.data_size() > 1);
      EXPECT_THROW(weights.experts(0, first + 1, count), InvariantError);
      // What somebody holds stays as it is; a prefetch that nobody asks for does no harm.
      std::vector<ExpertWeights> held;
      for (const int64_t l : {0, 1, 3, 4}) held.push_back(weights.experts(l, first, count));
      for (int64_t l = 0; l < L; ++l) weights.prefetch(l);
      size_t i = 0;
      for (const int64_t l : {0, 1, 3, 4}) EXPECT_TRUE(same(held[i++], layer(l))) << l;
      EXPECT_GT(weights.traffic().replaced, 0);
    }
  world->all().barrier("end");
}
TEST(ShardedWeights, GiveTheBitsOfTheWhole) {
  testing::run_ranks("sharded_weights", 2);
  testing::run_ranks("sharded_weights", 4);
}

// A whole model: loaded in parts, forward and backward with every layer gathered twice, beside a gradient that nobody
// waits for.
RANK_BODY(sharded_model) {
  const auto world = testing::join();
  const Mesh mesh = distributed::make_mesh(world, 1);
  const std::filesystem::path dir = std::filesystem::path(test_source_dir()) / "tests/golden/model/olmoe";
  model::LoadOptions offload, shard;
  offload.experts = model::Experts::offloaded;
  shard.keep_experts = [&](std::shared_ptr<model::WeightProvider> rest) {
    return std::make_shared<ShardedWeights>(std::move(rest), mesh);
  };
  std::vector<at::Tensor> hidden, gradients;
  for (const bool sharded : {false, true}) {
    model::Decoder decoder(model::load_base(dir, sharded ? shard : offload));
    decoder.set_dispatcher(make_dispatcher(mesh, sharded));
    const int64_t D = decoder.spec().hidden_size;
    const at::Tensor rows =
        at::randn({4, D}, at::make_generator<at::CPUGeneratorImpl>(uint64_t{5}), at::kFloat).requires_grad_(true);
    decoder.attach_rows({1, decoder.total_vocab(), rows, rows});
    model::PackedBatch batch =
        model::pack_rows(at::tensor(std::vector<int64_t>{5, 6, 7, 8, 9, decoder.spec().vocab_size,
                                                         decoder.spec().vocab_size + 2, int64_t{3}},
                                    at::kLong)
                             .view({1, 8}));
    batch.modality_T = at::tensor({0, 0, 0, 0, 0, 1, 1, 0}, at::kLong);
    batch.labels_T = at::tensor({int64_t{6}, int64_t{7}, int64_t{8}, int64_t{9}, model::kNoLabel,
                                 decoder.spec().vocab_size + 1, int64_t{3}, int64_t{4}},
                                at::kLong);
    model::ForwardOptions forward;
    forward.lockstep = true;
    const auto result = decoder.forward(batch, forward);
    model::cross_entropy_loss(decoder, result, batch).loss.backward();
    hidden.push_back(result.hidden_TD.detach());
    gradients.push_back(rows.grad().clone());
  }
  EXPECT_TRUE(at::equal(hidden[0], hidden[1]));
  EXPECT_TRUE(at::equal(gradients[0], gradients[1]));
  world->all().barrier("end");
}
TEST(ShardedWeights, AModelGivesTheBitsOfTheWhole) { testing::run_ranks("sharded_model", 2); }

}  // namespace
}  // namespace moegraft::parallel
