#pragma once
// `moegraft inspect --plan`: what a training would take on a cluster.

#include <optional>
#include <string>
#include <vector>

#include "moegraft/io/json.h"
#include "moegraft/planning/cluster.h"
#include "moegraft/run/run_config.h"

namespace moegraft::tools {

// "nodes=4,gpus=8,expert=8,shard_base=true,shard_optimizer=true", on top of `defaults`. UsageError.
planning::ClusterLayout parse_layout(const std::string& text, const planning::ClusterLayout& defaults = {});

// The report of `moegraft inspect --plan`. config: a run's; without one the step is the measured one.
io::Json plan_cluster(const model::DecoderSpec& spec, const std::optional<run::RunConfig>& config,
                      const model::Vocabulary& vocabulary, at::Device device, const std::string& layout,
                      const std::vector<std::string>& measured);

}  // namespace moegraft::tools
