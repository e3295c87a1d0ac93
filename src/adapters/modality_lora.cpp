#include "moegraft/adapters/modality_lora.h"

#include "libtorch.h"

#include <cmath>

namespace moegraft::adapters {

ModalityLora::ModalityLora(const AdapterContext& c)
    : Adapter(c),
      scale_(c.config.use_rslora ? c.config.alpha / std::sqrt(double(c.config.rank))
                                 : c.config.alpha / double(c.config.rank)) {
  const auto leaf = [&](const std::vector<int64_t>& shape) {
    return at::zeros(shape, at::TensorOptions(at::kFloat).device(c.device)).set_requires_grad(true);
  };
  for (const Position& p : positions()) {
    const auto [in, out] = site_shape(c.spec, p.site);
    std::vector<int64_t> a{c.config.rank, in}, b{out, c.config.rank};
    if (is_per_expert(c.spec, p.site)) a.insert(a.begin(), num_experts()), b.insert(b.begin(), num_experts());
    factors_.push_back({p.layer, p.site, name_of(p), leaf(a), leaf(b)});
  }
}

std::vector<model::LowRank> ModalityLora::terms(size_t position) const {
  const Factor& f = factors_[position];
  return {{f.A, f.B, scale_, modalities()}};
}

std::vector<Adapter::Parameter> ModalityLora::parameters() const {
  std::vector<Parameter> all;
  for (const Factor& f : factors_) {
    const bool per_expert = f.A.dim() == 3;
    all.push_back({f.name + ".A", f.layer, f.A, per_expert, config::name_of(config().init)});
    all.push_back({f.name + ".B", f.layer, f.B, per_expert, "zero"});
  }
  return all;
}

void ModalityLora::initialise() {
  const at::NoGradGuard no_grad;
  for (Factor& f : factors_) f.B.zero_();
}

}  // namespace moegraft::adapters
