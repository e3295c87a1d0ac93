#include "moegraft/model/fixed_step.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"

namespace moegraft::model {

FixedStep::FixedStep(const Decoder& decoder, KvCache& cache, int64_t count, int64_t modality, Head head, bool record)
    : decoder_(decoder),
      cache_(cache),
      head_(std::move(head)),
      record_(record),
      factors_(make_factor_caches(decoder.spec())) {
  MOEGRAFT_INVARIANT(count >= 1 && count <= cache.num_sequences(), "a step of ", count, " sequences over a cache of ",
                     cache.num_sequences());
  if (const std::string why = record ? obstacle(decoder) : ""; !why.empty())
    fail<UsageError>("decoding cannot be recorded as a CUDA graph here: ", why, "; leave --cuda-graphs out");
  const DecoderSpec& s = decoder.spec();
  MOEGRAFT_CHECK(s.rope.type != "dynamic" || cache.max_length() <= s.max_positions,
                 "a fixed step cannot follow rotary frequencies that change with the length: room for ",
                 cache.max_length(), " positions, the model has ", s.max_positions);
  lengths_.assign(cache.lengths_.begin(), cache.lengths_.begin() + count);
  lengths_B_ = at::tensor(at::ArrayRef<int64_t>(lengths_), at::kLong).to(decoder.device());
  // Attention reads the whole room: what was never written must be finite.
  const at::Tensor beyond_BS =
      at::arange(cache.max_length(), lengths_B_.options()).unsqueeze(0) >= lengths_B_.unsqueeze(1);
  for (auto* layers : {&cache.keys, &cache.values})
    for (const at::Tensor& cells : *layers)
      cells.narrow(0, 0, count).masked_fill_(beyond_BS.unsqueeze(2).unsqueeze(3), 0);
  batch_.positions_T = lengths_B_;
  batch_.ids_T = at::zeros_like(lengths_B_);
  batch_.modality_T = at::full_like(lengths_B_, modality);
  for (int64_t i = 0; i <= count; ++i) batch_.cu_seqlens.push_back(i);
}

std::string FixedStep::obstacle(const Decoder& decoder) {
  const DecoderSpec& s = decoder.spec();
  if (decoder.base().weights->transient())
    return "the experts visit the device layer by layer (model.offload, parallel.shard_base)";
  if (!decoder.dispatcher().is_local()) return "the experts are spread over several processes (parallel.expert)";
  if (s.rope.type == "dynamic") return "the rotary frequencies depend on the longest sequence (rope_scaling dynamic)";
  const bool sparse = std::any_of(s.layers.begin(), s.layers.end(), [](const auto& layer) { return layer.sparse; });
  return kernels::recording_obstacle(decoder.device(), decoder.dtype(), s.num_experts, s.hidden_size,
                                     sparse ? s.moe_intermediate_size : 0, s.head_dim);
}

// Once the ids are known: which rows of the embedding they are, and with that all that the host must know of a step.
void FixedStep::prepare(const std::vector<int64_t>& ids) {
  const std::vector<int64_t> bounds = decoder_.id_bounds();
  batch_.facts = std::make_shared<BatchFacts>(describe_batch(batch_, bounds));
  const auto above = std::upper_bound(bounds.begin(), bounds.end(), ids.front());
  id_range_ = {*(above - 1), *above};
}

void FixedStep::run() {
  ForwardOptions options;
  options.cache = &cache_;
  options.lengths_B = lengths_B_;
  options.factors = &factors_;
  out_ = head_(decoder_.forward(batch_, options).hidden_TD);
  lengths_B_.add_(1);
}

at::Tensor FixedStep::operator()(const std::vector<int64_t>& ids) {
  MOEGRAFT_INVARIANT(ids.size() == lengths_.size(), ids.size(), " ids for a step of ", lengths_.size(), " sequences");
  const at::NoGradGuard no_grad;
  std::vector<int64_t>& have = lengths_;
  const std::vector<int64_t> want(cache_.lengths_.begin(), cache_.lengths_.begin() + int64_t(have.size()));
  for (size_t i = 0; i < want.size(); ++i)
    MOEGRAFT_CHECK(want[i] < cache_.max_length(), "sequence ", i, " needs ", want[i] + 1,
                   " positions, the cache holds ", cache_.max_length());
  if (have != want)
    lengths_B_.copy_(at::tensor(at::ArrayRef<int64_t>(want), at::kLong));  // other sequences than the last step left
  batch_.ids_T.copy_(at::tensor(at::ArrayRef<int64_t>(ids), at::kLong));
  if (!batch_.facts) prepare(ids);
  for (const int64_t id : ids)
    MOEGRAFT_CHECK(id >= id_range_.first && id < id_range_.second, "token id ", id, " is outside [", id_range_.first,
                   ", ", id_range_.second, "), the ids of this step's modality");

  have.assign(have.size(), -1);  // nobody knows, should something throw
  at::Tensor out;
  if (graph_) {
    graph_->replay();
    out = out_;
  } else if (record_) {
    graph_.emplace(decoder_.device(), [&] {
      run();
      if (!out.defined()) out = out_;  // of the run in earnest
    });
  } else {
    run();
    out = out_;
  }
  for (size_t i = 0; i < want.size(); ++i) have[i] = cache_.lengths_[i] = want[i] + 1;
  return out;
}

}  // namespace moegraft::model
