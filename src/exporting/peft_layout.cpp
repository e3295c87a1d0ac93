#include "peft_layout.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::exporting {
namespace {

using model::Site;

struct Place {
  const char* module;
  bool second_half;  // of the fused output
};

Place place_of(Site site) {
  switch (site) {
    case Site::q: return {"self_attn.q_proj", false};
    case Site::k: return {"self_attn.k_proj", false};
    case Site::v: return {"self_attn.v_proj", false};
    case Site::o: return {"self_attn.o_proj", false};
    case Site::gate: return {"mlp.experts.gate_up_proj", false};
    case Site::up: return {"mlp.experts.gate_up_proj", true};
    case Site::down: return {"mlp.experts.down_proj", false};
  }
  return {"", false};
}

// Families whose transformers modules carry these names; a model with others must not get a file that loads as a silent no-op.
void check_family(const std::string& family) {
  const std::vector<std::string> known = {"mixtral", "olmoe", "qwen3_moe"};
  MOEGRAFT_CHECK(std::find(known.begin(), known.end(), family) != known.end(), "the names of ", family, "'s modules in transformers are not known to the PEFT export; known: ",
                 join(known, ", "));
}

// Position among a layer's targets.
int order_of(const std::string& module) {
  static const std::vector<std::string> order = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"};
  return int(std::find(order.begin(), order.end(), module) - order.begin());
}

}  // namespace

std::vector<Target> collect_targets(const model::DecoderSpec& spec, const std::vector<std::shared_ptr<adapters::ModalityLora>>& adapters) {
  check_family(spec.family);
  std::vector<Target> targets;
  for (size_t i = 0; i < adapters.size(); ++i)
    for (const auto& f : adapters[i]->factors()) {
      const Place place = place_of(f.site);
      auto target = std::find_if(targets.begin(), targets.end(), [&](const Target& t) { return t.layer == f.layer && t.module == place.module; });
      if (target == targets.end()) {
        Target t;
        t.layer = f.layer, t.module = place.module, t.experts = adapters::is_expert_site(f.site);
        const auto [in, out] = adapters::site_shape(spec, f.site);
        t.num_experts = t.experts ? spec.num_experts : 1;
        t.in = in, t.out = f.site == Site::gate || f.site == Site::up ? 2 * out : out;
        targets.push_back(std::move(t));
        target = std::prev(targets.end());
      }
      Term term{i, f.site, f.A.detach().to(at::kCPU, at::kFloat), f.B.detach().to(at::kCPU, at::kFloat), adapters[i]->scale(), target->rank, place.second_half ? target->out / 2 : 0};
      target->rank += term.rank();
      target->terms.push_back(std::move(term));
    }
  std::stable_sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) { return std::pair(a.layer, order_of(a.module)) < std::pair(b.layer, order_of(b.module)); });
  return targets;
}

std::string tensor_key(const Target& target, const std::vector<Target>& all, const char* factor) {
  std::string path = target.path();
  if (target.experts) {
    const bool both = std::count_if(all.begin(), all.end(), [&](const Target& t) { return t.layer == target.layer && t.experts; }) == 2;
    path = "model.layers." + std::to_string(target.layer) + ".mlp.experts";
    if (both && target.module == "mlp.experts.gate_up_proj") path += ".base_layer";
  }
  return "base_model.model." + path + "." + factor + ".weight";
}

Factors pack(const Target& t, double scale) {
  at::Tensor A_ERX = at::zeros({t.num_experts, t.rank, t.in}), B_EYR = at::zeros({t.num_experts, t.out, t.rank});
  for (const Term& term : t.terms) {
    const at::Tensor A = term.A.dim() == 2 ? term.A.unsqueeze(0) : term.A, B = term.B.dim() == 2 ? term.B.unsqueeze(0) : term.B;
    A_ERX.narrow(1, term.rank_begin, term.rank()).copy_(A);
    B_EYR.narrow(1, term.out_begin, B.size(1)).narrow(2, term.rank_begin, term.rank()).copy_(term.scale == scale ? B : B * (term.scale / scale));
  }
  // With one expert this is the dense layout too.
  return {A_ERX.reshape({t.num_experts * t.rank, t.in}), B_EYR.permute({1, 2, 0}).reshape({t.out, t.rank * t.num_experts}).contiguous()};
}

}  // namespace moegraft::exporting
