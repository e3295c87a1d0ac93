#include "cluster_plan.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "moegraft/adapters/sites.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/model/device.h"

namespace moegraft::tools {
namespace {

using io::Json;
using planning::Purpose;

bool as_bool(const std::string& key, const std::string& value) {
  MOEGRAFT_CHECK_USAGE(value == "true" || value == "false" || value.empty(), "--plan: ", key,
                       " is true or false, got '", value, "'");
  return value != "false";
}

planning::MemoryRequest request_of_step(const Json& step, const model::DecoderSpec& spec, at::Device device,
                                        const planning::ClusterLayout& layout) {
  planning::MemoryRequest r;
  r.spec = spec;
  r.dtype = graft::parse_dtype(step.at("dtype"));
  r.device = device;
  r.gate_open = step.at("gate") == "all";
  r.tokens = (step.at("tokens").get<int64_t>() + layout.processes() - 1) / layout.processes();
  r.expert_size = layout.expert, r.data_size = layout.processes() / layout.expert;
  r.shard_base = layout.shard_base, r.shard_optimizer = layout.shard_optimizer;
  r.new_rows = step.at("new_rows");
  if (step.at("rank").get<int64_t>() > 0) {
    planning::MemoryRequest::Adapter adapter{step.at("rank"), {}, {}};
    for (const auto& name : step.at("sites")) adapter.sites.push_back(adapters::parse_site(name));
    r.adapters.push_back(std::move(adapter));
  }
  return r;
}

}  // namespace

planning::ClusterLayout parse_layout(const std::string& text, const planning::ClusterLayout& defaults) {
  planning::ClusterLayout layout = defaults;
  for (const auto& item : split(text, ',')) {
    const size_t at = item.find('=');
    const std::string key = item.substr(0, at), value = at == std::string::npos ? "" : item.substr(at + 1);
    const std::map<std::string, int64_t*> numbers{
        {"nodes", &layout.nodes}, {"gpus", &layout.gpus}, {"expert", &layout.expert}};
    if (key == "shard_base")
      layout.shard_base = as_bool(key, value);
    else if (key == "shard_optimizer")
      layout.shard_optimizer = as_bool(key, value);
    else {
      MOEGRAFT_CHECK_USAGE(
          numbers.contains(key), "--plan: '", key,
          "' is none of nodes, gpus, expert, shard_base, shard_optimizer; example: nodes=2,gpus=8,expert=8");
      const bool digits = !value.empty() && value.size() < 7 &&
                          std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; });
      MOEGRAFT_CHECK_USAGE(digits && std::stoll(value) > 0, "--plan: ", key, " must be a number above 0, got '", value,
                           "'");
      *numbers.at(key) = std::stoll(value);
    }
  }
  MOEGRAFT_CHECK_USAGE(layout.processes() % layout.expert == 0, "--plan: expert (", layout.expert, ") must divide the ",
                       layout.processes(), " processes");
  return layout;
}

Json plan_cluster(const model::DecoderSpec& spec, const std::optional<run::RunConfig>& given,
                  const model::Vocabulary& vocabulary, at::Device device, const std::string& text,
                  const std::vector<std::string>& files) {
  const planning::Measurements measured(files);
  const Json& step = measured.step();
  planning::ClusterLayout layout;
  if (given)
    layout.expert = given->parallel.expert, layout.shard_base = given->parallel.shard_base,
    layout.shard_optimizer = given->parallel.shard_optimizer;
  layout = parse_layout(text, layout);
  MOEGRAFT_CHECK_USAGE(spec.num_experts % layout.expert == 0, "--plan: expert (", layout.expert,
                       ") must divide the model's ", spec.num_experts, " experts");
  planning::MemoryRequest request;
  int64_t micro_batches = 1, recompute = step.at("recompute_layers");
  double tokens = step.at("tokens"), bucket_bytes = 25 * double(1 << 20);
  if (given) {
    run::RunConfig config = *given;
    config.parallel.expert = layout.expert, config.parallel.shard_base = layout.shard_base,
    config.parallel.shard_optimizer = layout.shard_optimizer;
    request = planning::memory_request(spec, config, vocabulary, device, layout.processes());
    micro_batches = config.train.accumulation;
    tokens = double(config.data.tokens_per_step);
    bucket_bytes = config.parallel.bucket_mib * double(1 << 20);
  } else {
    MOEGRAFT_CHECK(step.at("active_parameters") == spec.num_active_parameters(),
                   "--measured: the step is of another model (", step.at("active_parameters").get<int64_t>(),
                   " active parameters, here ", spec.num_active_parameters(),
                   "); give -c CONFIG to plan for a model by the measured speed of another");
    device = std::string(step.at("device")).starts_with("cuda") ? at::kCUDA : at::kCPU;
    request = request_of_step(step, spec, device, layout);
  }
  request.free_bytes = model::free_memory(device).value_or(0);
  const planning::MemoryPlan memory = planning::plan_memory(request);
  if (given) recompute = memory.recompute_layers;
  planning::MemoryRequest average = request;  // the largest micro-batch is for memory, the mean one for time
  average.tokens = std::max<int64_t>(1, std::llround(tokens / double(layout.processes() * micro_batches)));
  const auto traffic = planning::count_traffic(average, micro_batches, recompute, bucket_bytes);
  const bool overlap = std::string(step.at("device")).starts_with("cuda");
  const planning::ClusterTimes times = planning::predict(measured, average, traffic, layout, micro_batches, overlap);
  planning::MemoryRequest one = average;
  one.expert_size = one.data_size = 1, one.tokens = std::max<int64_t>(1, std::llround(tokens / double(micro_batches)));
  const double alone = planning::predict(measured, one, {}, {}, micro_batches, overlap).step();
  Json bytes;
  for (const Purpose p : {Purpose::gradients, Purpose::experts, Purpose::base, Purpose::updates, Purpose::agreement})
    bytes[planning::name_of(p)] = planning::total_bytes(traffic, p);
  Json out{{"nodes", layout.nodes},
           {"processes", layout.processes()},
           {"expert", layout.expert},
           {"data", layout.processes() / layout.expert},
           {"shard_base", layout.shard_base},
           {"shard_optimizer", layout.shard_optimizer},
           {"tokens_per_step", tokens},
           {"step_seconds", times.step()},
           {"tokens_per_s", tokens / times.step()},
           {"compute_seconds", times.compute},
           {"communication_share", times.exposed / times.step()},
           {"times_one_process", alone / times.step()},
           {"seconds_under_way",
            {{"gradients", times.gradients},
             {"experts", times.experts},
             {"base", times.base},
             {"updates", times.updates},
             {"agreement", times.agreement}}},
           {"step_traffic_bytes", bytes},
           {"process_memory_bytes", memory.total()},
           {"recompute_layers", memory.recompute_layers}};
  if (layout.nodes > 1 && !measured.measured_between_nodes())
    out["note"] =
        "no exchange between machines was measured: their network is taken to be as fast as the links within one";
  return out;
}

}  // namespace moegraft::tools
