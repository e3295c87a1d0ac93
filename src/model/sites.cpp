#include "moegraft/model/sites.h"

#include "libtorch.h"

namespace moegraft::model {

at::Tensor MlpInput::tokens_of(const std::vector<int64_t>& modalities) const {
  const auto options = at::TensorOptions(at::kLong).device(x_TD.device());
  if (every_token) return at::arange(batch.num_tokens(), options);
  const auto& tokens_of_modality = batch.facts->modality_tokens;
  std::vector<at::Tensor> parts;
  for (const int64_t m : modalities)
    if (m < int64_t(tokens_of_modality.size())) parts.push_back(tokens_of_modality[size_t(m)]);
  if (parts.empty()) return at::empty({0}, options);
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

at::Tensor MlpInput::spread(const at::Tensor& weight_X, const at::Tensor& tokens_X) const {
  return at::zeros({batch.num_tokens()}, weight_X.options().dtype(at::kFloat).requires_grad(false))
      .index_copy(0, tokens_X, weight_X.to(at::kFloat));
}

MlpTerms AdapterSites::mlp(const MlpInput& in) const {
  return {at(in.layer, Site::gate), at(in.layer, Site::up), at(in.layer, Site::down), {}, {}};
}

at::Tensor AdapterSites::loss(const std::vector<at::Tensor>& parts) const { return at::stack(parts).sum(); }

}  // namespace moegraft::model
