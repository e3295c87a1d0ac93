#include "moegraft/evaluate/drift.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::evaluate {
namespace {

at::Tensor random_ids(at::IntArrayRef shape, int64_t vocab, uint64_t seed, const char* purpose) {
  Rng rng(seed, purpose);
  at::Tensor ids = at::empty(shape, at::kLong);
  for (int64_t i = 0; i < ids.numel(); ++i)
    ids.data_ptr<int64_t>()[i] = static_cast<int64_t>(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

// Ragged sequences end to end.
model::PackedBatch ragged(const at::Tensor& ids_T, const std::vector<int64_t>& lengths) {
  std::vector<at::Tensor> positions;
  model::PackedBatch batch;
  batch.ids_T = ids_T;
  batch.cu_seqlens = {0};
  for (const int64_t n : lengths) {
    positions.push_back(at::arange(n, ids_T.options()));
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + n);
  }
  batch.positions_T = at::cat(positions);
  return batch;
}

// The ids of every case; run() gives the text logits of all, on the CPU.
struct Inputs {
  at::Tensor one_11, block_BS, packed_T, decode_BS;
  std::vector<int64_t> lengths;

  std::vector<at::Tensor> run(const model::Decoder& decoder, bool mark_text) const {
    const auto logits = [&](model::PackedBatch batch, model::ForwardOptions options = {}) {
      if (mark_text)
        batch.modality_T = at::zeros_like(batch.ids_T);  // what a grafted run is given, the base is given none
      return decoder.text_logits(decoder.forward(batch, options).hidden_TD).to(at::kCPU).contiguous();
    };
    std::vector<at::Tensor> out{logits(model::pack_rows(one_11)), logits(model::pack_rows(block_BS)),
                                logits(ragged(packed_T, lengths))};
    model::KvCache cache(decoder.spec(), decode_BS.size(0), decode_BS.size(1), decoder.dtype(), decoder.device());
    model::ForwardOptions options;
    options.cache = &cache;
    std::vector<at::Tensor> steps;
    for (int64_t s = 0; s < decode_BS.size(1); ++s) {
      model::PackedBatch batch = model::pack_rows(decode_BS.narrow(1, s, 1).contiguous());
      batch.positions_T.fill_(s);
      steps.push_back(logits(batch, options));
    }
    out.push_back(at::stack(steps));
    return out;
  }
};

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace

Detached::Detached(graft::GraftedModel& model) : model_(model), rows_(model.decoder->rows()) {
  model.decoder->detach_all();
}

Detached::~Detached() {
  for (auto& rows : rows_) model_.decoder->attach_rows(std::move(rows));
  if (model_.adapters) model_.decoder->attach(model_.adapters);
}

double Drift::max_abs() const {
  double largest = 0;
  for (const auto& c : cases) largest = std::isnan(c.max_abs) ? c.max_abs : std::max(largest, c.max_abs);
  return largest;
}

bool Drift::exact() const {
  return !cases.empty() && std::all_of(cases.begin(), cases.end(), [](const DriftCase& c) { return c.equal_bits; });
}

Drift measure_drift(graft::GraftedModel& model, uint64_t seed) {
  MOEGRAFT_CHECK_USAGE(model.is_graft(), model.path.string(),
                       " has no modality besides text: drift compares a grafted run with its base");
  const at::NoGradGuard no_grad;
  const model::Decoder& decoder = *model.decoder;
  const int64_t V = model.vocabulary.text_size,
                S = decoder.spec().max_positions > 0 ? std::min<int64_t>(37, decoder.spec().max_positions) : 37;
  Inputs in;
  in.lengths = {std::min<int64_t>(5, S), 1, std::min<int64_t>(17, S), S, 2};
  const int64_t total = std::accumulate(in.lengths.begin(), in.lengths.end(), int64_t{0});
  in.one_11 = random_ids({1, 1}, V, seed, "drift.one").to(model.device());
  in.block_BS = random_ids({3, S}, V, seed, "drift.block").to(model.device());
  in.packed_T = random_ids({total}, V, seed, "drift.packed").to(model.device());
  in.decode_BS = random_ids({2, std::min<int64_t>(8, S)}, V, seed, "drift.decode").to(model.device());

  std::vector<at::Tensor> base;
  {
    const Detached bare(model);
    base = in.run(decoder, false);
  }
  const auto grafted = in.run(decoder, true);
  const std::vector<std::string> names{"1x1", "3x" + std::to_string(S), "packed", "decode"};
  Drift drift;
  for (size_t i = 0; i < names.size(); ++i) {
    const bool equal = base[i].sizes() == grafted[i].sizes() &&
                       std::memcmp(base[i].const_data_ptr(), grafted[i].const_data_ptr(), base[i].nbytes()) == 0;
    drift.cases.push_back({names[i], distance(base[i], grafted[i]), equal});
  }
  model::ForwardOptions open;
  open.gate = model::Gate::all;
  drift.gate_open = distance(
      base[1], decoder.text_logits(decoder.forward(model::pack_rows(in.block_BS), open).hidden_TD).to(at::kCPU));
  return drift;
}

}  // namespace moegraft::evaluate
