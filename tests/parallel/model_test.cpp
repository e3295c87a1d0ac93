// A whole model under every layout: the loss and the gradients of one process.

#include "libtorch.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>

#include "../support/paths.h"
#include "join.h"
#include "moegraft/base/check.h"
#include "moegraft/model/decoder.h"
#include "moegraft/parallel/gradients.h"
#include "moegraft/parallel/part.h"

namespace moegraft::parallel {
namespace {

using distributed::Mesh;
using model::DecoderSpec;
using model::Site;

at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

// 8 experts, 3 sparse layers; removed at the end.
struct Base {
  Base() : dir(std::filesystem::temp_directory_path() / ("moegraft_parallel_" + std::to_string(::getpid()))) {
    DecoderSpec spec = model::read_spec(std::filesystem::path(test_source_dir()) / "tests/golden/model/olmoe");
    spec.num_experts = 8;
    spec.num_layers = 3;
    spec.layers.assign(3, spec.layers.front());
    model::save_base(model::init_base(spec, {1.0, 3}), dir, at::kFloat);
  }
  ~Base() { std::filesystem::remove_all(dir); }
  std::filesystem::path dir;
};

// Gated terms on v, gate and down of every layer; of experts those in [first, first + count).
class Terms : public model::AdapterSites {
 public:
  Terms(const DecoderSpec& s, int64_t first, int64_t count, model::ParameterRegistry& registry) {
    for (int64_t l = 0; l < s.num_layers; ++l)
      for (const auto& [site, name, in, out, expert] :
           {std::tuple(Site::v, "v", s.hidden_size, s.num_kv_heads * s.head_dim, false),
            std::tuple(Site::gate, "gate", s.hidden_size, s.moe_intermediate_size, true),
            std::tuple(Site::down, "down", s.moe_intermediate_size, s.hidden_size, true)}) {
        std::vector<int64_t> a{3, in}, b{out, 3};
        if (expert) a.insert(a.begin(), s.num_experts), b.insert(b.begin(), s.num_experts);
        const auto make = [&, expert = expert, name = name, l = l](const char* factor, at::IntArrayRef shape,
                                                                   uint64_t seed) {
          at::Tensor t = at::randn(shape, generator(seed), at::kFloat) * 0.3;
          if (expert) t = t.narrow(0, first, count).clone();
          t.requires_grad_(true);
          registry.add({.name = "layers." + std::to_string(l) + "." + name + "." + factor,
                        .tensor = t,
                        .group = "lora",
                        .layer = l,
                        .sharding = expert ? model::Sharding::expert : model::Sharding::replicated,
                        .first_row = expert ? first : 0,
                        .total_rows = expert ? s.num_experts : 0});
          return t;
        };
        const uint64_t seed = uint64_t(100 * l + 10 * int(site));
        const at::Tensor A = make("A", a, seed), B = make("B", b, seed + 1);
        terms_[{l, site}] = {A, B, 1.5, {1}};
      }
  }
  std::vector<model::LowRank> at(int64_t layer, Site site) const override {
    const auto it = terms_.find({layer, site});
    if (it == terms_.end()) return {};
    return {it->second};
  }

 private:
  std::map<std::pair<int64_t, Site>, model::LowRank> terms_;
};

// Sequences before|image|after; the second is text alone.
constexpr int64_t kSequences[][3] = {{18, 6, 0}, {30, 0, 0}, {20, 5, 7}, {17, 9, 1}};

model::PackedBatch pack(int64_t V, const std::vector<int64_t>& which) {
  model::PackedBatch batch;
  batch.cu_seqlens = {0};
  std::vector<int64_t> ids, modality, positions, labels;
  for (const int64_t i : which) {
    const auto& [before, image, after] = kSequences[i];
    for (int64_t t = 0; t < before + image + after; ++t) {
      const bool is_image = t >= before && t < before + image;
      ids.push_back(is_image ? V + (t * 5 + i) % 6 : 3 + (t * 7 + 11 * i) % (V - 3));
      modality.push_back(is_image);
      positions.push_back(t);
      if (t > 0) labels.push_back(ids.back());
    }
    labels.push_back(model::kNoLabel);
    batch.cu_seqlens.push_back(int64_t(ids.size()));
  }
  if (which.empty()) {  // the placeholder of a rank without a share
    ids = {3}, modality = {0}, positions = {0}, labels = {model::kNoLabel};
    batch.cu_seqlens.push_back(1);
  }
  batch.ids_T = at::tensor(ids, at::kLong);
  batch.modality_T = at::tensor(modality, at::kLong);
  batch.positions_T = at::tensor(positions, at::kLong);
  batch.labels_T = at::tensor(labels, at::kLong);
  return batch;
}

struct Outcome {
  double loss = 0;
  model::ParameterRegistry registry;  // with gradients
};

void step(Outcome& out, const std::filesystem::path& dir, const Mesh* mesh, bool shard_base,
          const std::vector<int64_t>& which, bool frozen_prefix, int64_t recompute, int64_t num_labels) {
  const Part part = mesh ? load_part(dir, {}, *mesh, shard_base)
                         : Part{model::load_base(dir), std::make_shared<model::LocalDispatcher>()};
  model::Decoder decoder(part.base);
  const DecoderSpec& s = decoder.spec();
  decoder.set_dispatcher(part.dispatcher);
  const auto rows = [&](const char* name, uint64_t seed) {
    const at::Tensor t = (0.3 * at::randn({6, s.hidden_size}, generator(seed), at::kFloat)).requires_grad_(true);
    out.registry.add({name, t, "embeddings"});
    return t;
  };
  const at::Tensor embedding = rows("rows.image.embedding", 1), head = rows("rows.image.head", 2);
  decoder.attach_rows({1, s.vocab_size, embedding, head});
  decoder.attach(std::make_shared<Terms>(s, part.experts.first,
                                         part.experts.second > 0 ? part.experts.second : s.num_experts, out.registry));
  std::optional<GradientReducer> reducer;
  if (mesh) reducer.emplace(out.registry, *mesh, 2000);
  if (reducer) reducer->begin_step(), reducer->last_backward();
  model::ForwardOptions forward;
  forward.lockstep = mesh && lockstep(*mesh, shard_base);
  forward.frozen_prefix = frozen_prefix;
  forward.recompute_layers = recompute;
  const model::PackedBatch batch = pack(s.vocab_size, which);
  const auto loss = model::cross_entropy_loss(decoder, decoder.forward(batch, forward), batch, double(num_labels));
  if (loss.loss.requires_grad()) loss.loss.backward();
  if (reducer) reducer->finish();
  at::Tensor sum = at::full({1}, loss.loss.item<double>(), at::kDouble);
  if (mesh) mesh->world->all().all_reduce(sum, "loss").wait();
  out.loss = sum.item<double>();
}

RANK_BODY(whole_model) {
  const auto world = testing::join();
  const Base base;
  const int64_t W = world->size();
  const std::vector<int64_t> all{0, 1, 2, 3};
  int64_t num_labels = 0;
  for (const auto& [before, image, after] : kSequences) num_labels += before + image + after - 1;
  Outcome whole;
  step(whole, base.dir, nullptr, false, all, true, 0, num_labels);
  for (int64_t ep = 1; ep <= W; ep *= 2) {
    const Mesh mesh = distributed::make_mesh(world, ep);
    for (const bool shard_base : {false, true})
      for (const int variant : {0, 1, 2}) {  // spread; all on the first rank, without frozen prefix; spread, recomputed
        if (shard_base && (variant == 2 || mesh.data_size() == 1)) continue;
        SCOPED_TRACE("expert " + std::to_string(ep) + (shard_base ? ", sharded base" : "") + ", variant " +
                     std::to_string(variant));
        std::vector<int64_t> mine;
        for (const int64_t i : all)
          if (variant == 1 ? world->rank() == 0 : i % W == world->rank()) mine.push_back(i);
        Outcome share;
        step(share, base.dir, &mesh, shard_base, mine, variant != 1, variant == 2 ? 3 : 0, num_labels);
        EXPECT_NEAR(share.loss, whole.loss, 1e-5 * whole.loss);
        for (size_t i = 0; i < whole.registry.all().size(); ++i) {
          const auto& p = share.registry.all()[i];
          at::Tensor want = whole.registry.all()[i].tensor.grad();
          ASSERT_TRUE(want.defined() && p.tensor.grad().defined()) << p.name;
          const double scale = want.abs().max().item<double>();
          EXPECT_GT(scale, 0) << p.name;
          if (p.total_rows > 0) want = want.narrow(0, p.first_row, p.tensor.size(0));
          EXPECT_LE((p.tensor.grad() - want).abs().max().item<double>(), 1e-5 * scale) << p.name;
        }
      }
  }
  world->all().barrier("end");
}
TEST(ParallelModel, TwoRanksGiveOneProcessesGradients) { testing::run_ranks("whole_model", 2); }
TEST(ParallelModel, FourRanksGiveOneProcessesGradients) { testing::run_ranks("whole_model", 4); }

}  // namespace
}  // namespace moegraft::parallel
