#pragma once
// A tiny random graft without files: 2 layers, byte tokenizer, 16 codes of 3x3 pictures, random factors on every site.
#include "libtorch.h"

#include "moegraft/adapters/modality_lora.h"
#include "moegraft/base/check.h"
#include "moegraft/generate/images.h"
#include "moegraft/generate/text.h"
#include "moegraft/model/weights.h"

namespace moegraft::generate::testing {

constexpr int64_t kText = 300, kCodes = 16, kGrid = 3, kLength = kGrid * kGrid, kBos = 1, kEos = 2;

class ByteTokenizer : public tokenizer::Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text, bool) const override {
    std::vector<int64_t> ids;
    for (const char c : text) ids.push_back(3 + static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(const std::vector<int64_t>& ids, bool) const override {
    std::string text;
    for (const int64_t id : ids) {
      MOEGRAFT_CHECK(id >= 0 && id < size(), "id ", id);
      if (id >= 3) text += static_cast<char>(id - 3);
    }
    return text;
  }
  int64_t size() const override { return 259; }
  int64_t id_of(std::string_view) const override { return -1; }
  std::string piece_of(int64_t) const override { return ""; }
  int64_t bos_id() const override { return kBos; }
  int64_t eos_id() const override { return kEos; }
};

// A cell of the grid is one grey: code / 15.
class GreyCodec : public codec::ImageCodec {
 public:
  std::string architecture() const override { return "grey"; }
  int64_t image_size() const override { return 2 * kGrid; }
  codec::CodeShape shape() const override { return {{kGrid, kGrid}}; }
  int64_t codebook_size() const override { return kCodes; }
  at::Tensor codebook_NZ() const override { return at::arange(kCodes, at::kFloat).unsqueeze(1); }
  at::Tensor encode(const at::Tensor& x) const override {
    check_pixels(x);
    return (at::avg_pool2d(x.mean(1, true), 2) * 15).round().to(at::kLong).reshape({x.size(0), kLength});
  }
  at::Tensor decode(const at::Tensor& ids) const override {
    check_ids(ids);
    return (ids.to(at::kFloat) / 15)
        .reshape({-1, 1, kGrid, kGrid})
        .expand({-1, 3, kGrid, kGrid})
        .repeat_interleave(2, 2)
        .repeat_interleave(2, 3);
  }
  void to(at::Device) override {}
};

inline model::DecoderSpec tiny_spec() {
  model::DecoderSpec s;
  s.family = "olmoe";
  s.vocab_size = kText;
  s.hidden_size = 32;
  s.num_layers = 2;
  s.num_heads = 4;
  s.num_kv_heads = 2;
  s.head_dim = 8;
  s.moe_intermediate_size = 24;
  s.intermediate_size = 24;
  s.num_experts = 4;
  s.num_experts_per_tok = 2;
  s.qk_norm = model::QkNorm::full;
  s.layers.assign(2, {});
  s.max_positions = 64;
  s.bos_id = kBos;
  s.eos_id = kEos;
  s.initializer_range = 0.3;
  return s;
}

inline graft::GraftedModel tiny_graft(bool with_images = true) {
  const model::DecoderSpec spec = tiny_spec();
  graft::GraftedModel m;
  m.path = "models/tiny";
  m.decoder = std::make_unique<model::Decoder>(model::init_base(spec, {1.0, 5}));
  m.vocabulary = {kText, kBos, kEos, {}};
  m.tokenizer = std::make_shared<ByteTokenizer>();
  if (!with_images) return m;
  m.vocabulary.modalities.push_back({"image", 1, kText, kCodes, kLength});
  m.codecs["image"] = std::make_shared<GreyCodec>();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  const auto normal = [&](at::IntArrayRef shape, double std) {
    return at::empty(shape, at::kFloat).normal_(0.0, std, generator);
  };
  m.decoder->attach_rows(
      {1, kText, normal({kCodes + 2, spec.hidden_size}, 1.0), normal({kCodes + 2, spec.hidden_size}, 0.5)});
  auto lora =
      std::make_shared<adapters::ModalityLora>(spec, adapters::AdapterConfig{}, 0, std::vector<int64_t>{1}, at::kCPU);
  const at::NoGradGuard no_grad;
  for (auto& factor : lora->factors()) {
    factor.A.copy_(normal(factor.A.sizes(), 0.1));
    factor.B.copy_(normal(factor.B.sizes(), 0.1));
  }
  m.adapters = std::make_shared<adapters::AdapterStack>();
  m.adapters->add(lora);
  m.decoder->attach(m.adapters);
  return m;
}

// Code logits [T, N] of whole sequences without a cache.
inline at::Tensor full_code_logits(const graft::GraftedModel& m, const PromptTokens& tokens) {
  const at::NoGradGuard no_grad;
  model::PackedBatch batch;
  batch.ids_T = at::tensor(at::ArrayRef<int64_t>(tokens.ids), at::kLong);
  batch.modality_T = at::tensor(at::ArrayRef<int64_t>(tokens.modality), at::kLong);
  batch.positions_T = at::arange(tokens.size(), at::kLong);
  batch.cu_seqlens = {0, tokens.size()};
  return m.decoder->modality_logits(m.decoder->forward(batch).hidden_TD, 0).narrow(1, 2, kCodes);
}

inline PromptTokens append_picture(PromptTokens tokens, const at::Tensor& ids_L) {
  tokens.ids.push_back(kText);
  for (int64_t i = 0; i < ids_L.size(0); ++i) tokens.ids.push_back(kText + 2 + ids_L[i].item<int64_t>());
  tokens.modality.resize(tokens.ids.size(), 1);
  return tokens;
}

// The message of the error that f throws.
template <class E, class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const E& e) { return e.what(); } catch (const std::exception& e) {
    return std::string("another kind of error: ") + e.what();
  }
  return "no error";
}

}  // namespace moegraft::generate::testing
