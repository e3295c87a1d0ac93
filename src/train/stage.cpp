#include "stage.h"

#include "libtorch.h"

#include <memory>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "startup.h"

namespace moegraft::train {
namespace {

std::vector<std::string> names_of(const model::Vocabulary& vocabulary) {
  std::vector<std::string> names{"text"};
  for (const auto& m : vocabulary.modalities) names.push_back(m.name);
  return names;
}

}  // namespace

Stage::Stage(const run::RunConfig& config, graft::GraftedModel& trained, const distributed::Mesh& mesh)
    : model(trained),
      modality_names(names_of(model.vocabulary)),
      distributed(config.parallel, mesh, *model.registry,
                  config.train.gradients == GradientDtype::bf16 ? at::kBFloat16 : at::kFloat),
      optimizer(make_optimizer(*model.registry, config.train, distributed.owned())),
      schedule{config.train.schedule, config.train.warmup, config.train.steps, config.train.min_lr_ratio},
      stream(std::make_unique<data::BatchStream>(
                 config.data.train, config.data, model.vocabulary, uint64_t(config.run.seed),
                 data::Share{config.train.accumulation, distributed.rank(), distributed.size()}),
             config.data.prefetch, model.device().is_cuda()) {
  if (!config.data.eval.empty())
    eval.emplace(config.data.eval, config.data, model.vocabulary, config.train.eval_tokens,
                 data::Share{1, distributed.rank(), distributed.size()});
}

void Stage::restore(const checkpoint::Checkpoint& from, const std::string& data_cursor, bool data_changed) {
  optimizer.load_state(from.optimizer);
  try {
    stream.restore(data_cursor);
  } catch (const UserError& e) {
    if (!data_changed) throw;  // that it is other data was accepted
    log::warning("data.train is read from its beginning: ", e.what());
  }
}

}  // namespace moegraft::train
