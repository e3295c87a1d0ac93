// Decoding in steps that could be recorded: transformers' logits, and nothing in a step that depends on what only the
// host knows.
#include <gtest/gtest.h>

#include <filesystem>

#include "../support/gpu.h"
#include "aligned_model.h"
#ifndef MOEGRAFT_HAVE_CUDA
#include "../support/emulated_device.h"
#endif
#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/fixed_step.h"

namespace moegraft::model {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

std::vector<int64_t> to_vector(const at::Tensor& t) {
  const at::Tensor host = t.to(at::kCPU).contiguous();
  return {host.const_data_ptr<int64_t>(), host.const_data_ptr<int64_t>() + host.numel()};
}

// The two golden sequences up to `lengths` tokens, in a cache.
KvCache filled(const Decoder& decoder, const at::Tensor& ids_BS, const std::vector<int64_t>& lengths) {
  KvCache cache(decoder.spec(), 3, 16, decoder.dtype(), decoder.device());
  for (auto* layers : {&cache.keys, &cache.values})
    for (at::Tensor& cells : *layers) cells.fill_(NAN);  // as memory may be that nobody wrote
  for (int64_t b = 0; b < 2; ++b) {
    KvCache one(decoder.spec(), 1, 11, decoder.dtype(), decoder.device());
    ForwardOptions options;
    options.cache = &one;
    decoder.forward(pack_rows(ids_BS.narrow(0, b, 1).narrow(1, 0, lengths[size_t(b)])), options);
    cache.copy_sequence(b, one, 0);
  }
  return cache;
}

class FixedSteps : public testing::TestWithParam<const char*> {};

TEST_P(FixedSteps, ContinueTheLogitsOfTransformers) {
  const at::NoGradGuard no_grad;
  const auto golden = io::load_safetensors(kGolden / GetParam() / "golden.safetensors");
  const Decoder decoder(load_base(kGolden / GetParam()));
  const at::Tensor ids = golden.at("input_ids"), expected = golden.at("logits");
  const double tolerance = 1e-4 * std::max(1.0, expected.abs().max().item<double>());
  KvCache cache = filled(decoder, ids, {4, 2});  // of different lengths
  FixedStep step(
      decoder, cache, 2, 0, [&](const at::Tensor& hidden_BD) { return decoder.all_logits(hidden_BD); }, false);
  const auto go_on = [&] {
    std::vector<int64_t> next;
    for (int64_t b = 0; b < 2; ++b) next.push_back(ids[b][cache.length(b)].item<int64_t>());
    const at::Tensor logits = step(next);
    for (int64_t b = 0; b < 2; ++b)
      EXPECT_LT(distance(logits[b], expected[b][cache.length(b) - 1]), tolerance)
          << "sequence " << b << ", position " << cache.length(b) - 1;
  };
  for (int i = 0; i < 7; ++i) go_on();
  cache.truncate(1, 5);  // the host changes its mind
  cache.truncate(0, 3);
  for (int i = 0; i < 4; ++i) go_on();
}

INSTANTIATE_TEST_SUITE_P(Families, FixedSteps,
                         testing::Values("olmoe", "olmoe_clip_norm_tied", "qwen3", "qwen3_mixed", "qwen3_yarn",
                                         "mixtral", "mixtral_window", "mixtral_llama3", "mixtral_linear"),
                         [](const auto& info) { return std::string(info.param); });

TEST(FixedStep, RefusesWhatItCannotDo) {
  const at::NoGradGuard no_grad;
  const Decoder decoder(load_base(kGolden / "qwen3"));
  const at::Tensor ids = io::load_safetensors(kGolden / "qwen3" / "golden.safetensors").at("input_ids");
  KvCache cache = filled(decoder, ids, {10, 11});
  FixedStep step(decoder, cache, 2, 0, [](const at::Tensor& hidden) { return hidden; }, false);
  for (int i = 0; i < 5; ++i) step({3, 4});
  EXPECT_THROW(step({3, 4}), UserError);  // 16 positions are full
  cache.truncate(0, 2);
  cache.truncate(1, 2);
  EXPECT_THROW(step({3, decoder.total_vocab()}), UserError);
  EXPECT_THROW(step({-1, 3}), UserError);
  EXPECT_NO_THROW(step({3, 4}));
  EXPECT_THROW(
      FixedStep(decoder, cache, 2, 0, [](const at::Tensor& hidden) { return hidden; }, true), UsageError);  // on a CPU
}

#ifndef MOEGRAFT_HAVE_CUDA

// A gated term on the experts and on q, so that adapters' paths are in the step.
class Terms : public AdapterSites {
 public:
  explicit Terms(const DecoderSpec& s) {
    at::manual_seed(1);
    gate_ = {0.3 * at::randn({s.num_experts, 8, s.hidden_size}),
             0.3 * at::randn({s.num_experts, s.moe_intermediate_size, 8}),
             2.0,
             {1}};
    q_ = {0.3 * at::randn({8, s.hidden_size}), 0.3 * at::randn({s.num_heads * s.head_dim, 8}), 2.0, {1}};
  }
  std::vector<LowRank> at(int64_t, Site site) const override {
    return site == Site::gate ? std::vector{gate_} : site == Site::q ? std::vector{q_} : std::vector<LowRank>{};
  }

 private:
  LowRank gate_, q_;
};

TEST(FixedStep, ReplayedOnAnEmulatedDeviceEqualsOrdinaryDecoding) {
  const at::NoGradGuard no_grad;
  const kernels::Emulation on;
  const AlignedModel model;
  BaseModel base = model.load(at::kFloat, at::kCPU);
  base.weights = std::make_shared<AsOnADevice>(base.weights);
  Decoder decoder(std::move(base));
  const DecoderSpec& s = decoder.spec();
  decoder.attach(std::make_shared<Terms>(s));
  decoder.attach_rows({1, s.vocab_size, at::randn({20, s.hidden_size}), at::randn({20, s.hidden_size})});
  const auto head = [&](const at::Tensor& hidden) { return decoder.modality_logits(hidden, 0); };
  KvCache cache = filled(decoder, model.ids_BS, {9, 2}), other = filled(decoder, model.ids_BS, {9, 2});
  FixedStep step(decoder, cache, 2, 1, head, true);
  std::vector<at::Tensor> replayed, expected;
  const auto compare = [&](int64_t first, int64_t second) {
    const std::vector<int64_t> ids{s.vocab_size + first, s.vocab_size + second};
    const int64_t layers = kernels::emulated_layers;
    replayed.push_back(step(ids).clone());
    if (replayed.size() > 1) EXPECT_EQ(kernels::emulated_layers, layers) << "a replay went through the code";
    ForwardOptions options;
    options.cache = &other;
    PackedBatch batch = pack_rows(at::tensor(at::ArrayRef<int64_t>(ids), at::kLong).unsqueeze(1));
    batch.modality_T = at::ones({2}, at::kLong);
    batch.positions_T = at::tensor({other.length(0), other.length(1)}, at::kLong);
    expected.push_back(head(decoder.forward(batch, options).hidden_TD));
    EXPECT_LT(distance(replayed.back(), expected.back()), 1e-4) << "step " << replayed.size();
    EXPECT_EQ(cache.length(0), other.length(0));
  };
  for (const int64_t id : {3, 0, 19, 7, 7}) compare(id, 19 - id);
  for (KvCache* c : {&cache, &other}) c->truncate(0, 4);  // the recorded step follows sequences that are replaced
  for (const int64_t id : {1, 2, 3}) compare(id, id);
  EXPECT_GT(distance(expected[3], expected[4]), 1e-2);
}

#endif

TEST(Cuda, ARecordedStepEqualsTheOneThatIsNot) {
  MOEGRAFT_NEEDS_GPU();
  const at::NoGradGuard no_grad;
  const AlignedModel model;
  const Decoder decoder(model.load(at::kBFloat16, at::kCUDA));
  if (const std::string why = FixedStep::obstacle(decoder); !why.empty()) GTEST_SKIP() << why;
  const at::Tensor ids = model.ids_BS.to(at::kCUDA);
  const auto head = [&](const at::Tensor& hidden) { return decoder.text_logits(hidden); };
  KvCache a = filled(decoder, ids, {4, 2}), b = filled(decoder, ids, {4, 2});
  FixedStep recorded(decoder, a, 2, 0, head, true), plain(decoder, b, 2, 0, head, false);
  std::vector<int64_t> next{5, 6};
  for (int i = 0; i < 9; ++i) {
    if (i == 5) a.truncate(1, 3), b.truncate(1, 3);
    const at::Tensor x = recorded(next).clone(), y = plain(next);
    EXPECT_TRUE(at::equal(x, y)) << "step " << i;
    next = to_vector(y.argmax(-1));
  }
}

}  // namespace
}  // namespace moegraft::model
