#include "moegraft/graft/calibration.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "moegraft/adapters/sites.h"
#include "moegraft/base/check.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::graft {
namespace {

model::Site stored(model::Site site) { return site == model::Site::up ? model::Site::gate : site; }

constexpr int64_t kRows =
    256;  // beyond them subspaces of the ranks in use hardly change, and a solver's time grows with their square

// Three digits that are enough when they are typed.
double round_up(double x) {
  const double digit = std::pow(10.0, std::floor(std::log10(x)) - 2);
  return std::ceil(x / digit) * digit;
}

}  // namespace

bool needs_calibration(const adapters::AdapterConfig& a) {
  const bool on_ffn = std::any_of(a.sites.begin(), a.sites.end(), [](const std::string& name) {
    return adapters::is_ffn_site(adapters::parse_site(name));
  });  // attention's A is Kaiming's
  return on_ffn && a.kind == adapters::AdapterKind::modality_lora && a.init_from.empty() &&
         config::row_of(a.init).needs_calibration;
}

int64_t CalibrationPlan::num_solves() const {
  int64_t sum = 0;
  for (const auto& s : solves) sum += s.count;
  return sum;
}

CalibrationPlan plan_calibration(const model::DecoderSpec& spec, const run::RunConfig& config) {
  CalibrationPlan plan;
  const int64_t experts = spec.has_experts() ? spec.num_experts : 1;
  int64_t rank = 0;
  size_t largest = 0;  // the adapter of that rank
  for (size_t i = 0; i < config.adapters.size(); ++i) {
    const auto& a = config.adapters[i];
    if (!needs_calibration(a)) continue;
    const auto is_in = [&](int64_t layer) {
      return a.layers.empty() || std::find(a.layers.begin(), a.layers.end(), layer) != a.layers.end();
    };
    int64_t layers = 0;
    for (int64_t l = 0; l < spec.num_layers; ++l) layers += adapters::has_site(spec, l, model::Site::gate) && is_in(l);
    std::vector<model::Site> seen;
    for (const auto& name : a.sites) {
      const model::Site site = stored(adapters::parse_site(name));
      if (!adapters::is_ffn_site(site) || std::find(seen.begin(), seen.end(), site) != seen.end()) continue;
      seen.push_back(site);
      if (layers == 0) continue;
      if (a.rank > rank) rank = a.rank, largest = i;
      if (config::row_of(a.init).needs_ot)
        plan.solves.push_back({layers * experts, adapters::site_shape(spec, site).in, a.rank});
    }
  }
  if (rank == 0) return plan;  // no adapter asks for inputs
  // Inputs of both sites of every expert are seen, of text and of each new modality.
  int64_t layers = 0;
  for (int64_t l = 0; l < spec.num_layers; ++l) layers += adapters::has_site(spec, l, model::Site::gate);
  const auto width = int64_t(c10::elementSize(parse_dtype(config.model.dtype)));
  const int64_t row_of_all = layers * experts * (1 + int64_t(config.modalities.size())) *
                             (spec.hidden_size + adapters::site_shape(spec, model::Site::down).in) * width;
  const double bound = config.ot.calibration_gib * double(int64_t{1} << 30);
  plan.wanted = std::max(kRows, rank);
  plan.rows = int64_t(std::min(double(plan.wanted), bound / double(row_of_all)));
  MOEGRAFT_CHECK_USAGE(plan.rows >= rank, "ot.calibration_gib: ", config.ot.calibration_gib, " GiB hold ", plan.rows,
                       " rows of each expert's inputs, and adapters of rank ", rank, " need as many: set it to ",
                       round_up(double(rank * row_of_all) / double(int64_t{1} << 30)), " at least, or use adapters[",
                       largest, "].init: ", config::name_of(adapters::FactorInit::kaiming_zero));
  plan.bytes = plan.rows * row_of_all;
  return plan;
}

Calibration::Calibration(int64_t rows_per_key, uint64_t seed) : rows_per_key_(rows_per_key), seed_(seed) {
  MOEGRAFT_CHECK(rows_per_key >= 1, "calibration must keep at least one row per expert, got ", rows_per_key);
}

void Calibration::observe_experts(int64_t layer, model::Site site, const at::Tensor& rows_RX,
                                  const std::vector<int64_t>& offsets, int64_t num_modalities) {
  at::NoGradGuard no_grad;
  MOEGRAFT_INVARIANT(num_modalities >= 1 && (int64_t(offsets.size()) - 1) % num_modalities == 0, "offsets of ",
                     offsets.size(), " entries for ", num_modalities, " modalities");
  const int64_t groups = int64_t(offsets.size()) - 1;
  std::vector<int64_t> picked;                          // rows to fetch, in one copy from the device
  std::vector<std::pair<Reservoir*, int64_t>> targets;  // where each goes
  for (int64_t g = 0; g < groups; ++g) {
    if (offsets[g] == offsets[g + 1]) continue;
    const int64_t expert = g / num_modalities, modality = g % num_modalities;
    const Key key{layer, stored(site), expert, modality};
    auto found = reservoirs_.find(key);
    if (found == reservoirs_.end()) {
      const uint64_t index =
          ((uint64_t(layer) * 64 + uint64_t(stored(site))) << 32) + uint64_t(expert) * 1024 + uint64_t(modality);
      found =
          reservoirs_
              .emplace(key, Reservoir{Rng(seed_, "graft.calibration", index), 0,
                                      at::empty({rows_per_key_, rows_RX.size(1)}, rows_RX.options().device(at::kCPU))})
              .first;
    }
    Reservoir& r = found->second;
    for (int64_t row = offsets[g]; row < offsets[g + 1]; ++row, ++r.seen) {
      const int64_t slot = r.seen < rows_per_key_ ? r.seen : int64_t(r.rng.below(uint64_t(r.seen) + 1));
      if (slot >= rows_per_key_) continue;
      picked.push_back(row);
      targets.emplace_back(&r, slot);
    }
  }
  if (picked.empty()) return;
  const at::Tensor rows =
      rows_RX.detach().index_select(0, at::tensor(picked, at::kLong).to(rows_RX.device())).cpu().contiguous();
  const size_t row = size_t(rows.size(1)) * rows.element_size();
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  for (size_t i = 0; i < picked.size(); ++i) {
    const auto& [to, slot] = targets[i];
    std::memcpy(static_cast<char*>(to->rows_NX.mutable_data_ptr()) + size_t(slot) * row, from + i * row, row);
  }
}

const Calibration::Reservoir* Calibration::find(int64_t layer, model::Site site, int64_t expert,
                                                int64_t modality) const {
  const auto found = reservoirs_.find({layer, stored(site), expert, modality});
  return found == reservoirs_.end() ? nullptr : &found->second;
}

at::Tensor Calibration::rows(int64_t layer, model::Site site, int64_t expert, int64_t modality) const {
  const Reservoir* r = find(layer, site, expert, modality);
  return r ? r->rows_NX.slice(0, 0, std::min(r->seen, rows_per_key_)) : at::Tensor();
}

at::Tensor Calibration::pool(int64_t layer, model::Site site, int64_t modality) const {
  std::vector<at::Tensor> parts;
  for (const auto& [key, r] : reservoirs_) {
    if (std::get<0>(key) == layer && std::get<1>(key) == stored(site) && std::get<3>(key) == modality)
      parts.push_back(r.rows_NX.slice(0, 0, std::min(r.seen, rows_per_key_)));
  }
  if (parts.empty()) return {};
  const at::Tensor all = at::cat(parts);
  auto order = Rng(seed_, "graft.calibration.pool", uint64_t(layer)).permutation(all.size(0));
  if (int64_t(order.size()) > rows_per_key_) order.resize(rows_per_key_);
  return all.index_select(0, at::tensor(order, at::kLong));
}

int64_t Calibration::seen(int64_t layer, model::Site site, int64_t expert, int64_t modality) const {
  const Reservoir* r = find(layer, site, expert, modality);
  return r ? r->seen : 0;
}

}  // namespace moegraft::graft
