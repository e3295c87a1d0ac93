#include "moegraft/adapters/vera.h"

#include "libtorch.h"

#include <algorithm>
#include <cmath>

#include "moegraft/base/rng.h"

namespace moegraft::adapters {
namespace {

// torch's kaiming_uniform_ with gain sqrt(2): uniform in +-sqrt(6 / in).
at::Tensor kaiming_uniform(int64_t out, int64_t in, int64_t seed, const char* name, at::Device device) {
  const auto generator =
      at::make_generator<at::CPUGeneratorImpl>(Rng(uint64_t(seed), std::string("adapters.vera.") + name).derive_seed());
  const double bound = std::sqrt(6.0 / double(in));
  return at::empty({out, in}, at::kFloat).uniform_(-bound, bound, generator).to(device);
}

// diag(v) m, of experts too: v [.., n], m [n, k] -> [.., n, k].
at::Tensor scale_rows(const at::Tensor& v, const at::Tensor& m_NK) { return v.unsqueeze(-1) * m_NK; }

}  // namespace

Vera::Vera(const AdapterContext& c) : Adapter(c) {
  const int64_t P = c.config.rank;
  SiteShape largest;
  for (const Position& p : positions()) {
    const SiteShape shape = site_shape(c.spec, p.site);
    largest = {std::max(largest.in, shape.in), std::max(largest.out, shape.out)};
  }
  A_PX_ = kaiming_uniform(P, largest.in, c.config.projection_seed, "A", c.device);
  B_YP_ = kaiming_uniform(largest.out, P, c.config.projection_seed, "B", c.device);
  const auto leaf = [&](const Position& p, int64_t width) {
    const auto options = at::TensorOptions(at::kFloat).device(c.device);
    return (is_per_expert(c.spec, p.site) ? at::zeros({num_experts(), width}, options) : at::zeros({width}, options))
        .set_requires_grad(true);
  };
  for (const Position& p : positions()) {
    const auto [in, out] = site_shape(c.spec, p.site);
    sites_.push_back(
        {name_of(p), p.layer, leaf(p, P), leaf(p, out), A_PX_.narrow(1, 0, in), B_YP_.narrow(0, 0, out), {}, {}});
  }
}

std::vector<model::LowRank> Vera::terms(size_t position) const {
  const Site& s = sites_[position];
  if (at::GradMode::is_enabled()) return {{scale_rows(s.d, s.A_PX), scale_rows(s.b, s.B_YP), 1.0, modalities()}};
  // Optimizers and checkpoints write in place, which counts versions up.
  if (s.d_version != int64_t(s.d._version()) || s.b_version != int64_t(s.b._version())) {
    s.made_A = scale_rows(s.d.detach(), s.A_PX), s.made_B = scale_rows(s.b.detach(), s.B_YP);
    s.d_version = int64_t(s.d._version()), s.b_version = int64_t(s.b._version());
  }
  return {{s.made_A, s.made_B, 1.0, modalities()}};
}

std::vector<Adapter::Parameter> Vera::parameters() const {
  std::vector<Parameter> all;
  for (const Site& s : sites_) {
    const bool per_expert = s.d.dim() == 2;
    all.push_back({s.name + ".d", s.layer, s.d, per_expert, "constant"});
    all.push_back({s.name + ".b", s.layer, s.b, per_expert, "zero"});
  }
  return all;
}

void Vera::initialise() {
  const at::NoGradGuard no_grad;
  for (Site& s : sites_) {
    s.d.fill_(config().d_initial);
    s.b.zero_();
  }
}

}  // namespace moegraft::adapters
