// Reads an export the way PEFT does, independently of the code that packed it.
#include "libtorch.h"

#include <algorithm>
#include <limits>
#include <regex>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/exporting/peft.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "peft_config.h"
#include "peft_layout.h"
#include "peft_rows.h"

namespace moegraft::exporting {
namespace {

namespace fs = std::filesystem;
using io::Json;

// Folding a scale into a float32 factor rounds by at most 2^-24 = 6e-8 of it; a plain copy by nothing.
constexpr double kTolerance = 1e-7;
constexpr int64_t kProbes = 4;

// adapter_config.json as PEFT uses it.
class Config {
 public:
  explicit Config(const fs::path& file) : file_(file.string()), json_(io::read_json(file)) {
    try {
      MOEGRAFT_CHECK(json_.at("peft_type") == "LORA", file_, ": peft_type must be LORA");
      MOEGRAFT_CHECK(json_.at("use_rslora") == false, file_, ": use_rslora must be false, the scale is lora_alpha/r");
    } catch (const Json::exception& e) { fail<UserError>(file_, ": ", e.what()); }
  }
  bool targets(const Target& t) const {
    const std::string path = t.path();
    for (const auto& entry : json_.at(t.experts ? "target_parameters" : "target_modules")) {
      const std::string name = entry.get<std::string>();
      if (path == name || path.ends_with("." + name)) return true;
    }
    return false;
  }
  int64_t rank(const std::string& path) const { return pattern("rank_pattern", path, json_.at("r")).get<int64_t>(); }
  double scale(const std::string& path) const {
    return pattern("alpha_pattern", path, json_.at("lora_alpha")).get<double>() / double(rank(path));
  }
  std::vector<int64_t> token_ids(const char* module) const {
    return json_.at("trainable_token_indices").at(module).get<std::vector<int64_t>>();
  }

 private:
  Json pattern(const char* key, const std::string& path, const Json& otherwise) const {
    for (const auto& [expression, value] : json_.at(key).items())
      if (std::regex_match(path, std::regex("(.*\\.)?(" + expression + ")"))) return value;
    return otherwise;
  }
  std::string file_;
  Json json_;
};

at::Tensor tensor_of(const io::SafetensorsFile& file, const std::string& key, at::IntArrayRef shape) {
  MOEGRAFT_CHECK(file.contains(key), file.path().string(), " has no ", key);
  const at::Tensor t = file.tensor(key);
  MOEGRAFT_CHECK(t.sizes() == shape, file.path().string(), ": ", key, " must have shape ", shape.vec(), ", got ",
                 t.sizes().vec());
  return t;
}

// What the run adds to the outputs of [in, n] probes, per expert: [E, out, n] float64.
at::Tensor expected_action(const Target& t, const at::Tensor& x_XN) {
  at::Tensor y_EYN = at::zeros({t.num_experts, t.out, x_XN.size(1)}, at::kDouble);
  for (const Term& term : t.terms) {
    const at::Tensor y = term.scale * at::matmul(term.B.to(at::kDouble), at::matmul(term.A.to(at::kDouble), x_XN));
    y_EYN.narrow(1, term.out_begin, term.B.size(-2)).add_(y);
  }
  return y_EYN;
}

TargetReport verify_target(const Target& t, const std::vector<Target>& all, const Config& config,
                           const io::SafetensorsFile& file, uint64_t seed) {
  TargetReport report{t.path(), t.rank, 0, {}, {}};
  MOEGRAFT_CHECK(config.targets(t), "adapter_config.json does not target ", report.path);
  const int64_t r = config.rank(report.path), E = t.num_experts;
  const at::Tensor A = tensor_of(file, tensor_key(t, all, "lora_A"), {E * r, t.in}),
                   B = tensor_of(file, tensor_key(t, all, "lora_B"), {t.out, E * r});
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const at::Tensor x_XN = at::empty({t.in, kProbes}, at::kDouble).normal_(0.0, 1.0, generator),
                   expected = expected_action(t, x_XN);
  // PEFT: weight_A.reshape(E, r, in), weight_B.reshape(out, r, E), delta_e = scaling * B[:, :, e] A[e].
  const at::Tensor A_ERX = A.view({E, r, t.in}), B_EYR = B.view({t.out, r, E}).permute({2, 0, 1});
  for (int64_t e = 0; e < E; ++e) {
    const at::Tensor y =
        config.scale(report.path) * at::matmul(B_EYR[e].to(at::kDouble), at::matmul(A_ERX[e].to(at::kDouble), x_XN));
    const double norm = expected[e].norm().item<double>(), difference = (y - expected[e]).norm().item<double>();
    const double error = difference == 0 ? 0 : norm > 0 ? difference / norm : std::numeric_limits<double>::infinity();
    MOEGRAFT_CHECK(error <= kTolerance, "the export of ", report.path, t.experts ? " expert " + std::to_string(e) : "",
                   " differs from the run: relative error ", error, ", at most ", kTolerance, " is rounding");
    report.relative_error = std::max(report.relative_error, error);
    report.nonzero.push_back(at::count_nonzero(A_ERX[e]).item<int64_t>() + at::count_nonzero(B_EYR[e]).item<int64_t>());
    if (norm == 0) report.silent_experts.push_back(e);
  }
  return report;
}

void verify_rows(const graft::GraftedModel& m, const Config& config, const io::SafetensorsFile& file) {
  for (const Rows& rows : new_rows(m)) {
    MOEGRAFT_CHECK(at::equal(tensor_of(file, rows.key(), rows.tensor_ND.sizes()), rows.tensor_ND), file.path().string(),
                   ": ", rows.key(), " differs from the run's rows");
    const auto ids = config.token_ids(rows.module);
    MOEGRAFT_CHECK(int64_t(ids.size()) == rows.tensor_ND.size(0), "trainable_token_indices of ", rows.module,
                   " must name ", rows.tensor_ND.size(0), " ids, got ", ids.size());
    for (size_t i = 0; i < ids.size(); ++i)
      MOEGRAFT_CHECK(ids[i] == m.vocabulary.text_size + int64_t(i), "trainable_token_indices of ", rows.module,
                     " must count up from ", m.vocabulary.text_size, "; entry ", i, " is ", ids[i]);
  }
}

}  // namespace

PeftReport verify_peft(const graft::GraftedModel& m, const fs::path& dir) {
  const at::NoGradGuard no_grad;
  MOEGRAFT_CHECK_USAGE(m.adapters && !m.adapters->adapters().empty(), m.path.string(), " has no adapter to compare ",
                       dir.string(), " with");
  const std::vector<Target> targets = collect_targets(m.decoder->spec(), m.adapters->adapters());
  const Config config(dir / "adapter_config.json");
  const io::SafetensorsFile file(dir / "adapter_model.safetensors");
  PeftReport report;
  report.output = dir;
  std::set<std::string> expected;
  try {
    uint64_t seed = 1;
    for (const Target& t : targets) {
      report.targets.push_back(verify_target(t, targets, config, file, seed++));
      const TargetReport& last = report.targets.back();
      report.relative_error = std::max(report.relative_error, last.relative_error);
      if (t.experts) report.experts += t.num_experts, report.silent_experts += int64_t(last.silent_experts.size());
      for (const char* factor : {"lora_A", "lora_B"}) expected.insert(tensor_key(t, targets, factor));
    }
    verify_rows(m, config, file);
  } catch (const Json::exception& e) { fail<UserError>((dir / "adapter_config.json").string(), ": ", e.what()); }
  for (const Rows& rows : new_rows(m)) expected.insert(rows.key());
  for (const auto& name : file.names())
    MOEGRAFT_CHECK(expected.count(name), file.path().string(), " holds ", name, ", which the run does not have");
  report.tensors = int64_t(expected.size());
  report.bytes = int64_t(fs::file_size(file.path()));
  report.new_rows = m.vocabulary.size() - m.vocabulary.text_size;
  return report;
}

std::string PeftReport::to_json() const {
  Json list = Json::array();
  for (const auto& t : targets)
    list.push_back({{"target", t.path},
                    {"rank", t.rank},
                    {"relative_error", t.relative_error},
                    {"nonzero", t.nonzero},
                    {"silent_experts", t.silent_experts}});
  return Json{{"format", "peft"},     {"output", output.string()},
              {"tensors", tensors},   {"bytes", bytes},
              {"new_rows", new_rows}, {"relative_error", relative_error},
              {"experts", experts},   {"silent_experts", silent_experts},
              {"targets", list}}
      .dump();
}

}  // namespace moegraft::exporting
