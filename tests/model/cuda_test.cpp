// The same model on a GPU: logits and gradients of overlays against the CPU, in float32 and bf16; what may not change a
// bit there; text. The bodies run on the host too, plainly and on an emulated device, so that only the card is new to
// them; on a card nothing here has run yet.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "../support/emulation.h"
#include "../support/gpu.h"
#include "../support/paths.h"
#include "aligned_model.h"
#include "libtorch.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "moegraft/model/device.h"
#include "moegraft/model/random_base.h"

namespace moegraft::model {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

// One gated low-rank term on every expert's gate and on q.
class Terms : public AdapterSites {
 public:
  Terms(const DecoderSpec& s, at::Device device) {
    at::manual_seed(1);
    const auto leaf = [&](at::IntArrayRef shape) {
      return (0.3 * at::randn(shape)).to(device).set_requires_grad(true);
    };
    gate_ = {leaf({s.num_experts, 3, s.hidden_size}), leaf({s.num_experts, s.moe_intermediate_size, 3}), 2.0, {1}};
    q_ = {leaf({3, s.hidden_size}), leaf({s.num_heads * s.head_dim, 3}), 2.0, {1}};
  }
  std::vector<LowRank> at(int64_t, Site site) const override {
    if (site == Site::gate) return {gate_};
    if (site == Site::q) return {q_};
    return {};
  }
  LowRank gate_, q_;
};

TEST(Cuda, LogitsLossAndGradientsEqualTheCpu) {
  MOEGRAFT_NEEDS_GPU();
  for (const char* name : {"olmoe", "qwen3_mixed", "mixtral_window"}) {
    std::vector<at::Tensor> results[3];
    for (const int variant : {0, 1, 2}) {  // the CPU, the GPU, the GPU with its experts in host memory
      const at::Device device(variant == 0 ? at::kCPU : at::kCUDA);
      Decoder decoder(
          load_base(kGolden / name, {at::kFloat, device, variant == 2 ? Experts::offloaded : Experts::resident}));
      auto terms = std::make_shared<Terms>(decoder.spec(), device);
      decoder.attach(terms);
      const at::Tensor ids = io::load_safetensors(kGolden / name / "golden.safetensors").at("input_ids").to(device);
      PackedBatch batch = pack_rows(ids);
      batch.modality_T = (at::arange(22) % 3 == 0).to(at::kLong).to(device);
      batch.labels_T = batch.ids_T.roll(-1);
      const auto forward = decoder.forward(batch);
      const auto loss = cross_entropy_loss(decoder, forward, batch);
      loss.loss.backward();
      for (const at::Tensor& t : {forward.hidden_TD.detach(), loss.loss.detach(), terms->gate_.A.grad(),
                                  terms->gate_.B.grad(), terms->q_.A.grad(), terms->q_.B.grad()})
        results[variant].push_back(t.to(at::kCPU, at::kDouble));
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      const double scale = 1 + results[0][i].abs().max().item<double>();
      for (const int variant : {1, 2})
        EXPECT_LT((results[0][i] - results[variant][i]).abs().max().item<double>(), 1e-4 * scale)
            << name << ", result " << i << (variant == 2 ? ", offloaded" : "");
    }
  }
}

TEST(Cuda, RoutersAreWidenedOnce) {
  MOEGRAFT_NEEDS_GPU();
  const BaseModel base = load_base(kGolden / "olmoe", {at::kBFloat16, at::kCUDA});
  const LayerWeights w = base.weights->layer(0);
  EXPECT_EQ(w.router_ED.scalar_type(), at::kFloat);
  EXPECT_EQ(w.input_norm_D.scalar_type(), at::kBFloat16);
}

// ------------------------------------------------------------------------------------------------ bf16

// Where a body runs: what the cards' tests ask for, and two stand-ins on the host.
struct Place {
  at::Device device;
  bool emulated = false;
};
const Place kGpu{at::kCUDA}, kHost{at::kCPU}, kEmulated{at::kCPU, true};

// Factors of rank 8 on all seven sites, gated; float32 masters, as in training.
class AllSites : public AdapterSites {
 public:
  AllSites(const DecoderSpec& s, at::Device device) {
    at::manual_seed(1);
    const int64_t D = s.hidden_size, F = s.moe_intermediate_size, E = s.num_experts, q = s.num_heads * s.head_dim,
                  kv = s.num_kv_heads * s.head_dim;
    const auto leaf = [&](at::IntArrayRef shape, double std) {
      return (std * at::randn(shape)).to(device).set_requires_grad(true);
    };
    const auto term = [&](Site site, std::vector<int64_t> experts, int64_t in, int64_t out) {
      const auto shape = [&](int64_t rows, int64_t columns) {
        std::vector<int64_t> sizes = experts;
        sizes.insert(sizes.end(), {rows, columns});
        return sizes;
      };
      terms_[site] = {leaf(shape(8, in), 1 / std::sqrt(double(in))), leaf(shape(out, 8), 0.1), 2.0, {1}};
    };
    term(Site::gate, {E}, D, F), term(Site::up, {E}, D, F), term(Site::down, {E}, F, D);
    term(Site::q, {}, D, q), term(Site::k, {}, D, kv), term(Site::v, {}, D, kv), term(Site::o, {}, q, D);
  }
  std::vector<LowRank> at(int64_t, Site site) const override {
    const auto found = terms_.find(site);
    return found == terms_.end() ? std::vector<LowRank>{} : std::vector{found->second};
  }
  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> out;
    for (const auto& [site, term] : terms_) out.insert(out.end(), {term.A, term.B});
    return out;
  }

 private:
  std::map<Site, LowRank> terms_;
};

// The experts of each token, sorted: which of two comes first says nothing. And by how much the last one won.
class Choices : public RoutingObserver {
 public:
  void observe(int64_t, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK, const at::Tensor&,
               const at::Tensor&) override {
    const int64_t K = topk_ids_TK.size(1);
    const at::Tensor top = std::get<0>(probs_TE.topk(K + 1, -1)).log();
    margins.push_back((top.select(1, K - 1) - top.select(1, K)).to(at::kCPU));
    ids.push_back(std::get<0>(topk_ids_TK.to(at::kCPU).sort(-1)));
  }
  std::vector<at::Tensor> ids, margins;  // by layer
};

constexpr int64_t kNewRows = 6;

// A checkpoint of numbers that are exact in bf16, in widths that the device's products and flash attention take.
class Checkpoint {
 public:
  Checkpoint() : dir_(std::filesystem::path(testing::TempDir()) / ("moegraft-cuda-" + std::to_string(::getpid()))) {
    DecoderSpec s;
    s.family = "qwen3_moe", s.qk_norm = QkNorm::per_head;
    s.vocab_size = 160, s.hidden_size = 64, s.num_heads = 4, s.num_kv_heads = 2, s.head_dim = 16;
    s.num_layers = 2, s.layers.assign(2, {});
    s.moe_intermediate_size = s.intermediate_size = 48, s.num_experts = 8, s.num_experts_per_tok = 2,
    s.router.renormalise = true;
    s.max_positions = 64;
    save_base(random_base(s, at::kBFloat16, at::kCPU, 3), dir_, at::kBFloat16);
  }
  ~Checkpoint() { std::filesystem::remove_all(dir_); }
  BaseModel load(at::ScalarType dtype, at::Device device, bool offload = false) const {
    BaseModel base = load_base(dir_, {dtype, device, offload ? Experts::offloaded : Experts::resident});
    if (device.is_cpu()) base.weights = std::make_shared<AsOnADevice>(base.weights);
    return base;
  }

 private:
  std::filesystem::path dir_;
};

// Sequences of 9 tokens, text then codes (or text alone); all labelled.
PackedBatch make_batch(const DecoderSpec& s, const std::vector<int64_t>& which, bool text_alone = false) {
  constexpr int64_t kLength = 9;
  std::vector<int64_t> ids, modality, positions, labels;
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (const int64_t i : which) {
    const int64_t text = text_alone ? kLength : 2 + i % 6;
    for (int64_t t = 0; t < kLength; ++t) {
      ids.push_back(t < text ? 3 + (i * 37 + t * 11 + i * i) % (s.vocab_size - 3)
                             : s.vocab_size + (i * 5 + t * t) % kNewRows);
      modality.push_back(t >= text);
      positions.push_back(t);
    }
    for (int64_t t = 0; t < kLength; ++t)
      labels.push_back(t + 1 < kLength ? ids[ids.size() - size_t(kLength - 1 - t)] : kNoLabel);
    batch.cu_seqlens.push_back(int64_t(ids.size()));
  }
  batch.ids_T = at::tensor(ids), batch.modality_T = at::tensor(modality), batch.positions_T = at::tensor(positions),
  batch.labels_T = at::tensor(labels);
  return batch;
}

struct World {
  World(BaseModel base)
      : decoder(std::move(base)), sites(std::make_shared<AllSites>(decoder.spec(), decoder.device())) {
    const DecoderSpec& s = decoder.spec();
    const auto rows = [&] { return at::randn({kNewRows, s.hidden_size}).to(decoder.device()).set_requires_grad(true); };
    decoder.attach(sites);
    decoder.attach_rows({1, s.vocab_size, rows(), (0.125 * rows()).detach().set_requires_grad(true)});
  }
  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> out = sites->leaves();
    out.insert(out.end(), {decoder.rows().front().embedding_ND, decoder.rows().front().head_ND});
    return out;
  }
  Decoder decoder;
  std::shared_ptr<AllSites> sites;
};

struct Outcome {
  std::vector<at::Tensor> results;  // hidden states, loss, gradients
  Choices choices;
};

Outcome step(World& w, const PackedBatch& batch, ForwardOptions options = {}) {
  for (auto& leaf : w.leaves()) leaf.mutable_grad() = at::Tensor();
  Outcome out;
  options.routing = &out.choices;
  options.frozen_prefix = false;  // one order of tokens for everybody
  const PackedBatch there = to_device(batch, w.decoder.device());
  const ForwardResult forward = w.decoder.forward(there, options);
  const LossResult loss = cross_entropy_loss(w.decoder, forward, there);
  loss.loss.backward();
  out.results = {forward.hidden_TD.detach(), loss.loss.detach()};
  for (const auto& leaf : w.leaves()) out.results.push_back(leaf.grad().clone());
  return out;
}

// Eight of 200 sequences whose every token, in every layer, chose its last expert by a clear margin: the logits of
// routing are off by about 1 % in bf16, and another expert is another result, not an error.
std::vector<int64_t> away_from_ties(World& exact) {
  const at::NoGradGuard no_grad;
  std::vector<int64_t> all(200), clear;
  for (size_t i = 0; i < all.size(); ++i) all[i] = int64_t(i);
  Choices choices;
  ForwardOptions options;
  options.routing = &choices;
  exact.decoder.forward(make_batch(exact.decoder.spec(), all), options);
  at::Tensor least = choices.margins[0];
  for (const auto& m : choices.margins) least = at::minimum(least, m);
  const at::Tensor by_sequence = std::get<0>(least.view({int64_t(all.size()), -1}).min(1));
  for (const int64_t i : all)
    if (clear.size() < 8 && by_sequence[i].item<double>() > 0.06) clear.push_back(i);
  return clear;
}

double relative(const at::Tensor& a, const at::Tensor& exact) {
  const at::Tensor e = exact.to(at::kCPU, at::kDouble);
  return ((a.to(at::kCPU, at::kDouble) - e).norm() / e.norm()).item<double>();
}

// By the same numbers in float32: no further off than the CPU in bf16.
void expect_bfloat16_as_good_as_the_cpus(const Place& place) {
  const Checkpoint checkpoint;
  World exact(checkpoint.load(at::kFloat, at::kCPU)), plain(checkpoint.load(at::kBFloat16, at::kCPU)),
      ours(checkpoint.load(at::kBFloat16, place.device));
  const std::vector<int64_t> clear = away_from_ties(exact);
  ASSERT_EQ(clear.size(), 8u);
  const PackedBatch batch = make_batch(exact.decoder.spec(), clear);
  const Outcome e = step(exact, batch), p = step(plain, batch);
  kernels::emulated = place.emulated;
  const int64_t layers = kernels::emulated_layers;
  const Outcome o = step(ours, batch);
  kernels::emulated = false;
  EXPECT_EQ(kernels::emulated_layers - layers, place.emulated ? 2 * exact.decoder.spec().num_layers : 0);
  for (size_t l = 0; l < e.choices.ids.size(); ++l) {
    EXPECT_TRUE(at::equal(p.choices.ids[l], e.choices.ids[l])) << "the CPU chose other experts in layer " << l;
    EXPECT_TRUE(at::equal(o.choices.ids[l], e.choices.ids[l])) << "other experts in layer " << l;
  }
  // A floor of one unit in the last place: the device's grouped products leave factor gradients in bf16, the CPU's in
  // float32.
  for (size_t i = 0; i < e.results.size(); ++i) {
    EXPECT_GT(e.results[i].abs().max().item<double>(), 0) << "result " << i;
    EXPECT_LE(relative(o.results[i], e.results[i]), 2 * relative(p.results[i], e.results[i]) + 1.0 / 256)
        << "result " << i;
  }
}

// How a step is computed must not show: layers stored, recomputed, or with experts that come from host memory.
void expect_equal_bits_however_computed(const Place& place) {
  const Checkpoint checkpoint;
  World resident(checkpoint.load(at::kBFloat16, place.device)),
      visiting(checkpoint.load(at::kBFloat16, place.device, true));
  const PackedBatch batch = make_batch(resident.decoder.spec(), {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  ForwardOptions recompute;
  recompute.recompute_layers = 100;
  kernels::emulated = place.emulated;
  const Outcome stored = step(resident, batch), again = step(resident, batch),
                recomputed = step(resident, batch, recompute), offloaded = step(visiting, batch, recompute);
  kernels::emulated = false;
  for (size_t i = 0; i < stored.results.size(); ++i) {
    EXPECT_TRUE(at::equal(stored.results[i], again.results[i])) << "twice, result " << i;
    EXPECT_TRUE(at::equal(stored.results[i], recomputed.results[i])) << "recomputed, result " << i;
    EXPECT_TRUE(at::equal(stored.results[i], offloaded.results[i])) << "offloaded, result " << i;
  }
}

// C1: a call whose tokens are all text gives the base's bits, whatever is grafted on.
void expect_text_keeps_the_bases_bits(const Place& place) {
  const at::NoGradGuard no_grad;
  const Checkpoint checkpoint;
  World graft(checkpoint.load(at::kBFloat16, place.device));
  const Decoder base(checkpoint.load(at::kBFloat16, place.device));
  kernels::emulated = place.emulated;
  for (const std::vector<int64_t>& which : {std::vector<int64_t>{0}, {1, 2, 3, 4, 5, 6, 7}}) {
    const PackedBatch batch = to_device(make_batch(graft.decoder.spec(), which, true), place.device);
    ForwardOptions open;
    open.gate = Gate::all;
    const at::Tensor a = graft.decoder.forward(batch).hidden_TD, b = base.forward(batch).hidden_TD;
    EXPECT_TRUE(at::equal(a, b));
    EXPECT_TRUE(at::equal(graft.decoder.text_logits(a), base.text_logits(b)));
    EXPECT_FALSE(at::equal(graft.decoder.forward(batch, open).hidden_TD, b)) << "the comparison must be able to fail";
  }
  kernels::emulated = false;
}

TEST(Cuda, Bfloat16IsAsGoodAsTheCpusWithGradients) {
  MOEGRAFT_NEEDS_GPU();
  expect_bfloat16_as_good_as_the_cpus(kGpu);
}
TEST(Cuda, StoredRecomputedAndOffloadedLayersGiveEqualBits) {
  MOEGRAFT_NEEDS_GPU();
  expect_equal_bits_however_computed(kGpu);
}
TEST(Cuda, TextKeepsTheBasesBits) {
  MOEGRAFT_NEEDS_GPU();
  expect_text_keeps_the_bases_bits(kGpu);
}

TEST(CudaOnTheHost, Bodies) {
  expect_bfloat16_as_good_as_the_cpus(kHost);
  expect_equal_bits_however_computed(kHost);
  expect_text_keeps_the_bases_bits(kHost);
}

#ifndef MOEGRAFT_HAVE_CUDA
TEST(CudaOnTheHost, BodiesOnAnEmulatedDevice) {
  expect_bfloat16_as_good_as_the_cpus(kEmulated);
  expect_equal_bits_however_computed(kEmulated);
  expect_text_keeps_the_bases_bits(kEmulated);
}
#endif

}  // namespace
}  // namespace moegraft::model
