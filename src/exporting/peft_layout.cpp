#include "peft_layout.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/model/families.h"

namespace moegraft::exporting {
namespace {

using model::Site;

// Position among a layer's targets: experts' gate and up are one.
int order_of(const Target& t) {
  const Site site = t.terms.front().site;
  return int(t.experts && site == Site::up ? Site::gate : site);
}

}  // namespace

std::vector<Target> collect_targets(const model::DecoderSpec& spec,
                                    const std::vector<std::shared_ptr<adapters::Adapter>>& adapters) {
  const at::NoGradGuard no_grad;
  std::vector<Target> targets;
  for (size_t i = 0; i < adapters.size(); ++i)
    for (const auto& [layer, site] : adapters[i]->positions()) {
      const model::LowRank f = adapters[i]->at(layer, site).front();
      const model::PeftModule module = model::peft_module(spec, site);
      auto target = std::find_if(targets.begin(), targets.end(),
                                 [&](const Target& t) { return t.layer == layer && t.module == module.name; });
      if (target == targets.end()) {
        Target t;
        t.layer = layer, t.module = module.name, t.experts = adapters::is_per_expert(spec, site);
        const auto [in, out] = adapters::site_shape(spec, site);
        t.num_experts = t.experts ? spec.num_experts : 1;
        t.in = in, t.out = t.experts && adapters::is_ffn_site(site) && site != Site::down ? 2 * out : out;
        targets.push_back(std::move(t));
        target = std::prev(targets.end());
      }
      Term term{i,
                site,
                f.A.detach().to(at::kCPU, at::kFloat),
                f.B.detach().to(at::kCPU, at::kFloat),
                adapters[i]->scale(),
                target->rank,
                module.second_half ? target->out / 2 : 0};
      target->rank += term.rank();
      target->terms.push_back(std::move(term));
    }
  std::stable_sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
    return std::pair(a.layer, order_of(a)) < std::pair(b.layer, order_of(b));
  });
  return targets;
}

std::string tensor_key(const Target& target, const std::vector<Target>& all, const char* factor) {
  std::string path = target.path();
  if (target.experts) {
    const bool both = std::count_if(all.begin(), all.end(),
                                    [&](const Target& t) { return t.layer == target.layer && t.experts; }) == 2;
    path.erase(path.rfind('.'));  // the module that holds both parameters
    if (both && target.terms.front().site != Site::down) path += ".base_layer";
  }
  return "base_model.model." + path + "." + factor + ".weight";
}

Factors pack(const Target& t, double scale) {
  at::Tensor A_ERX = at::zeros({t.num_experts, t.rank, t.in}), B_EYR = at::zeros({t.num_experts, t.out, t.rank});
  for (const Term& term : t.terms) {
    const at::Tensor A = term.A.dim() == 2 ? term.A.unsqueeze(0) : term.A,
                     B = term.B.dim() == 2 ? term.B.unsqueeze(0) : term.B;
    A_ERX.narrow(1, term.rank_begin, term.rank()).copy_(A);
    B_EYR.narrow(1, term.out_begin, B.size(1))
        .narrow(2, term.rank_begin, term.rank())
        .copy_(term.scale == scale ? B : B * (term.scale / scale));
  }
  // With one expert this is the dense layout too.
  return {A_ERX.reshape({t.num_experts * t.rank, t.in}),
          B_EYR.permute({1, 2, 0}).reshape({t.out, t.rank * t.num_experts}).contiguous()};
}

}  // namespace moegraft::exporting
