// A new grafted model: rows and factors initialised as the run asks.
#include "libtorch.h"

#include <algorithm>
#include <chrono>
#include <fstream>

#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/data/stream.h"
#include "moegraft/graft/calibration.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/graft/initialise_lora.h"
#include "moegraft/graft/initialise_rows.h"
#include "moegraft/io/json.h"
#include "moegraft/model/device.h"
#include "moegraft/run/identity.h"

namespace moegraft::graft {
namespace {

namespace fs = std::filesystem;

io::Json initialise_embeddings(GraftedModel& m, const run::RunConfig& config) {
  io::Json report = io::Json::object();
  auto& weights = *m.decoder->base().weights;
  const at::Tensor embedding = weights.embedding_VD().dense(at::kFloat).to(at::kCPU),
                   head = weights.head_VD().dense(at::kFloat).to(at::kCPU);
  const bool tied = m.decoder->spec().tie_word_embeddings;
  for (size_t i = 0; i < m.vocabulary.modalities.size(); ++i) {
    const auto& tokens = m.vocabulary.modalities[i];
    const RowsInit init = initialise_rows(config.embeddings.init, embedding, tied ? at::Tensor() : head,
                                          m.codecs.at(tokens.name)->codebook_NZ().to(at::kCPU), 2, config.ot,
                                          uint64_t(config.run.seed) + i);
    for (const auto& warning : init.report.warnings) log::warning("rows of ", tokens.name, ": ", warning);
    const auto& rows = m.decoder->rows()[i];
    rows.embedding_ND.detach().copy_(init.embedding_ND);
    if (!tied) rows.head_ND.detach().copy_(init.head_ND);
    report[tokens.name] = io::Json::parse(init.report.to_json());
  }
  return report;
}

// Runs documents of the training data through the model with its new rows, adapters still zero.
Calibration calibrate(const GraftedModel& m, const run::RunConfig& config) {
  at::NoGradGuard no_grad;
  const CalibrationPlan plan = plan_calibration(m.decoder->spec(), config);
  if (plan.rows < plan.wanted)
    log::info("ot.calibration_gib: ", config.ot.calibration_gib, " GiB hold ", plan.rows,
              " rows of each expert's inputs, instead of ", plan.wanted);
  Calibration calibration(plan.rows, uint64_t(config.run.seed));
  data::DataConfig mixed = config.data;  // a few steps, of every modality
  mixed.batching = data::Batching::mixed;
  data::BatchStream stream(config.data.train, mixed, m.vocabulary, uint64_t(config.run.seed));
  model::ForwardOptions options;
  options.sites = &calibration;
  Progress progress("calibrate, tokens", config.ot.calibration_tokens);
  for (int64_t tokens = 0; tokens < config.ot.calibration_tokens;
       progress.update(std::min(tokens, config.ot.calibration_tokens))) {
    const model::PackedBatch batch = model::to_device(stream.next().micro_batches.front(), m.device());
    m.decoder->forward(batch, options);
    tokens += batch.num_tokens();
  }
  progress.finish();
  return calibration;
}

// The factors of an earlier run's adapter at the same place: every tensor must be there with its shape.
void initialise_from(const adapters::Adapter& adapter, size_t index, const std::string& path,
                     const run::RunConfig& config) {
  fs::path dir = path;
  if (fs::is_directory(dir / "checkpoints")) {
    const auto latest = checkpoint::find_latest(dir / "checkpoints");
    MOEGRAFT_CHECK(latest.has_value(), "adapters[", index, "].init_from: ", path, " has no checkpoint");
    dir = *latest;
  }
  const checkpoint::Checkpoint saved = checkpoint::load(dir);
  run::Fingerprints was = checkpoint::state_from_json(saved.state).fingerprints;
  std::erase_if(was, [](const auto& entry) {
    return entry.first != "base";
  });  // factors mean something beside their own base only
  const std::string place = detail::concat("adapters[", index, "].init_from: ", path);
  if (was.empty())
    log::warning(place, " does not say which base it was trained on: whether it is this one is not checked");
  else
    run::check_fingerprints(was, run::take_fingerprints(config, run::Parts::model), config, place + " was trained on");
  for (const auto& p : adapter.parameters()) {
    const auto it = saved.parameters.find(p.name);
    MOEGRAFT_CHECK(it != saved.parameters.end(), "adapters[", index, "].init_from: ", path, " has no ", p.name,
                   "; it must come from a run with the same kind, layers and sites");
    MOEGRAFT_CHECK(it->second.sizes() == p.leaf.sizes(), "adapters[", index, "].init_from: ", p.name,
                   " must have shape ", p.leaf.sizes().vec(), ", got ", it->second.sizes().vec());
    p.leaf.detach().copy_(it->second);
  }
}

}  // namespace

bool initialises_by_running(const std::vector<adapters::AdapterConfig>& adapters) {
  return std::any_of(adapters.begin(), adapters.end(), needs_calibration);
}

GraftedModel build_model(const run::RunConfig& config, const OpenOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  GraftedModel m = assemble_model(config, options);
  if (!m.is_graft()) return m;
  at::NoGradGuard no_grad;
  io::Json report{{"rows", initialise_embeddings(m, config)}, {"adapters", io::Json::array()}};
  std::optional<Calibration> calibration;
  for (size_t i = 0; i < config.adapters.size(); ++i) {
    const auto& a = config.adapters[i];
    auto& adapter = *m.adapters->adapters()[i];
    if (!a.init_from.empty()) {
      initialise_from(adapter, i, a.init_from, config);
      report["adapters"].push_back({{"init_from", a.init_from}});
      continue;
    }
    if (needs_calibration(a) && !calibration && plan_calibration(m.decoder->spec(), config).rows > 0)
      calibration = calibrate(m, config);
    const int64_t modality = a.modality.front() == "text" ? 0 : m.vocabulary.by_name(a.modality.front()).modality;
    report["adapters"].push_back(io::Json::parse(initialise_lora(adapter, a.init, calibration ? &*calibration : nullptr,
                                                                 modality, config.ot, uint64_t(config.run.seed) + i)));
  }
  const double seconds = seconds_since(start);
  report["seconds"] = seconds;
  m.init_report_json = report.dump(2);
  log::info("initialised rows (", config::name_of(config.embeddings.init), ") and adapters in ",
            int64_t(seconds * 10) / 10.0, " s");
  return m;
}

}  // namespace moegraft::graft
