#include "cluster_plan.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "moegraft/adapters/sites.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/json.h"
#include "moegraft/model/device.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::json;
using train::Collective;
using train::Purpose;

// Rounds of messages, each a latency: rings, and a tree for broadcast.
double rounds(Collective collective, int64_t n) {
  switch (collective) {
    case Collective::all_reduce: return 2 * double(n - 1);
    case Collective::broadcast: return std::ceil(std::log2(double(n)));
    default: return double(n - 1);
  }
}
// Bytes that pass the busiest link per byte of the message, in the benchmark's units (all_gather: per byte of what is collected).
double link_share(Collective collective, int64_t n) {
  const double others = double(n - 1) / double(n);
  return collective == Collective::all_reduce ? 2 * others : collective == Collective::broadcast ? 1 : others;
}

// Milliseconds at `bytes` from points sorted by bytes: linear between them, flat below the first, at the last one's rate beyond it.
double interpolate(const std::vector<std::pair<double, double>>& points, double bytes) {
  if (bytes <= points.front().first) return points.front().second;
  for (size_t i = 1; i < points.size(); ++i)
    if (bytes <= points[i].first) {
      const double part = (bytes - points[i - 1].first) / (points[i].first - points[i - 1].first);
      return points[i - 1].second + part * (points[i].second - points[i - 1].second);
    }
  return points.back().second * bytes / points.back().first;
}

// Forward passes of layers again, as a share of a whole step without them.
double recomputed_share(const Json& step, double layers_share) {
  const Json& f = step.at("flops");
  const double total = f.at("forward").get<double>() + f.at("activation_gradient").get<double>() + f.at("lora").get<double>();
  return layers_share * (f.at("forward").get<double>() + f.at("lora").get<double>() / 3) / total;
}

bool as_bool(const std::string& key, const std::string& value) {
  MOEGRAFT_CHECK_USAGE(value == "true" || value == "false" || value.empty(), "--plan: ", key, " is true or false, got '", value, "'");
  return value != "false";
}

train::MemoryRequest request_of_step(const Json& step, const model::DecoderSpec& spec, at::Device device, const ClusterLayout& layout) {
  train::MemoryRequest r;
  r.spec = spec;
  r.dtype = graft::parse_dtype(step.at("dtype"));
  r.device = device;
  r.gate_open = step.at("gate") == "all";
  r.tokens = (step.at("tokens").get<int64_t>() + layout.processes() - 1) / layout.processes();
  r.expert_size = layout.expert, r.data_size = layout.processes() / layout.expert;
  r.shard_base = layout.shard_base, r.shard_optimizer = layout.shard_optimizer;
  r.new_rows = step.at("new_rows");
  if (step.at("rank").get<int64_t>() > 0) {
    train::MemoryRequest::Adapter adapter{step.at("rank"), {}, {}};
    for (const auto& name : step.at("sites")) adapter.sites.push_back(adapters::parse_site(name));
    r.adapters.push_back(std::move(adapter));
  }
  return r;
}

}  // namespace

ClusterLayout parse_layout(const std::string& text, const ClusterLayout& defaults) {
  ClusterLayout layout = defaults;
  for (const auto& item : split(text, ',')) {
    const size_t at = item.find('=');
    const std::string key = item.substr(0, at), value = at == std::string::npos ? "" : item.substr(at + 1);
    const std::map<std::string, int64_t*> numbers{{"nodes", &layout.nodes}, {"gpus", &layout.gpus}, {"expert", &layout.expert}};
    if (key == "shard_base") layout.shard_base = as_bool(key, value);
    else if (key == "shard_optimizer") layout.shard_optimizer = as_bool(key, value);
    else {
      MOEGRAFT_CHECK_USAGE(numbers.contains(key), "--plan: '", key, "' is none of nodes, gpus, expert, shard_base, shard_optimizer; example: nodes=2,gpus=8,expert=8");
      const bool digits = !value.empty() && value.size() < 7 && std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; });
      MOEGRAFT_CHECK_USAGE(digits && std::stoll(value) > 0, "--plan: ", key, " must be a number above 0, got '", value, "'");
      *numbers.at(key) = std::stoll(value);
    }
  }
  MOEGRAFT_CHECK_USAGE(layout.processes() % layout.expert == 0, "--plan: expert (", layout.expert, ") must divide the ", layout.processes(), " processes");
  return layout;
}

Measurements::Measurements(const std::vector<std::string>& files) {
  for (const auto& file : files) {
    const Json whole = io::read_json(file);
    const Json list = whole.contains("measured") ? whole.at("measured") : Json::array({whole});
    MOEGRAFT_CHECK(list.is_array(), file, ": \"measured\" must be a list");
    for (const auto& j : list) {
      const std::string kind = j.is_object() ? j.value("bench", "") : "";
      MOEGRAFT_CHECK(kind == "step" || kind == "collectives", file, " is not the output of bench collectives --json, of bench step --json or of tools/bench_scaling.sh");
      if (kind == "step" && j.value("processes", 0) == 1) steps_.push_back(j);
      if (kind == "collectives" && j.value("processes", 0) > 1) collectives_.push_back(j);
    }
  }
  MOEGRAFT_CHECK(!steps_.empty(), "--measured: the step time of one process is missing: add the output of moegraft bench step MODEL --json");
  std::sort(steps_.begin(), steps_.end(), [](const Json& a, const Json& b) { return a.at("tokens") > b.at("tokens"); });
  const auto same = [&](const char* key) {
    return std::all_of(steps_.begin(), steps_.end(), [&](const Json& j) { return j.at(key) == steps_[0].at(key); });
  };
  for (const char* key : {"dtype", "rank", "gate", "sites", "active_parameters", "threads", "device"})
    MOEGRAFT_CHECK(same(key), "--measured: the steps of one process differ in ", key, "; they may differ in tokens only");
}

double Measurements::compute_seconds(double tokens) const {
  std::vector<std::pair<double, double>> points;  // tokens, seconds
  for (const auto& j : steps_) points.insert(points.begin(), {j.at("tokens").get<double>(), j.at("median_step_s").get<double>()});
  if (tokens < points.front().first) return points.front().second * tokens / points.front().first;
  return interpolate(points, tokens);
}

bool Measurements::measured_between_nodes() const {
  return std::any_of(collectives_.begin(), collectives_.end(), [](const Json& j) { return j.value("nodes", 1) > 1; });
}

double Measurements::seconds(Collective collective, double bytes, int64_t members, bool between_nodes) const {
  if (members == 1 || bytes == 0) return 0;
  MOEGRAFT_CHECK(!collectives_.empty(), "--measured: exchanges between processes are missing: add the output of moegraft launch --nproc N -- bench collectives --json");
  const auto distance = [&](const Json& j) {
    return std::pair(between_nodes != (j.value("nodes", 1) > 1), std::abs(std::log(double(members) / j.at("processes").get<double>())));
  };
  const Json& nearest = *std::min_element(collectives_.begin(), collectives_.end(), [&](const Json& a, const Json& b) { return distance(a) < distance(b); });
  const int64_t n = nearest.at("processes");
  std::vector<std::pair<double, double>> points;
  for (const auto& one : nearest.at("collectives"))
    if (one.at("op") == train::name_of(collective)) points.emplace_back(one.at("bytes").get<double>(), one.at("ms").get<double>());
  MOEGRAFT_CHECK(!points.empty(), "--measured: ", train::name_of(collective), " was not measured; run bench collectives without --only");
  std::sort(points.begin(), points.end());
  if (collective == Collective::all_gather) bytes *= double(members);  // the benchmark counts what is collected
  // The same bytes on the busiest link as in the measured group.
  const double latency = points.front().second, alike = bytes * link_share(collective, members) / link_share(collective, n);
  const double carried = interpolate(points, alike) - latency;
  return (latency * rounds(collective, members) / rounds(collective, n) + std::max(carried, 0.0)) / 1e3;
}

ClusterTimes predict(const Measurements& measured, const train::MemoryRequest& r, const std::vector<train::Message>& traffic, const ClusterLayout& layout, int64_t micro_batches, bool overlap) {
  ClusterTimes times;
  const Json& step = measured.step();
  const double size = double(r.spec.num_active_parameters()) / step.at("active_parameters").get<double>();
  double compute = measured.compute_seconds(double(r.tokens)) * size * double(micro_batches);
  if (r.shard_base && r.data_size > 1) compute *= 1 + recomputed_share(step, 1.0);
  // More threads than cores take turns.
  if (r.device.is_cpu()) compute *= std::max(1.0, double(layout.gpus) * step.at("threads").get<double>() / step.at("cores").get<double>());
  times.compute = compute;
  for (const auto& m : traffic) {
    const int64_t members = m.group == train::Group::world ? layout.processes() : m.group == train::Group::expert ? layout.expert : layout.processes() / layout.expert;
    const bool between = m.group == train::Group::expert ? layout.expert > layout.gpus : layout.nodes > 1;
    const double seconds = m.calls * measured.seconds(m.collective, m.bytes_each, members, between);
    switch (m.purpose) {
      case Purpose::gradients: times.gradients += seconds; break;
      case Purpose::experts: times.experts += seconds; break;
      case Purpose::base: times.base += seconds; break;
      case Purpose::updates: times.updates += seconds; break;
      case Purpose::agreement: times.agreement += seconds; break;
    }
  }
  // Beside the computing: gradients behind the last backward pass (two thirds of a step), gathers of layers behind all of it. What it cannot hide remains.
  const double backward = compute / double(micro_batches) * 2 / 3;
  const double gradients = overlap ? std::max(0.0, times.gradients - backward) : times.gradients;
  const double base = overlap ? std::max(0.0, times.base - compute) : times.base;
  times.exposed = gradients + base + times.experts + times.updates + times.agreement;
  return times;
}

Json plan_cluster(const model::DecoderSpec& spec, const std::optional<run::RunConfig>& given, const model::Vocabulary& vocabulary, at::Device device, const std::string& text,
                  const std::vector<std::string>& files) {
  const Measurements measured(files);
  const Json& step = measured.step();
  ClusterLayout layout;
  if (given) layout.expert = given->parallel.expert, layout.shard_base = given->parallel.shard_base, layout.shard_optimizer = given->parallel.shard_optimizer;
  layout = parse_layout(text, layout);
  MOEGRAFT_CHECK_USAGE(spec.num_experts % layout.expert == 0, "--plan: expert (", layout.expert, ") must divide the model's ", spec.num_experts, " experts");
  train::MemoryRequest request;
  int64_t micro_batches = 1, recompute = step.at("recompute_layers");
  double tokens = step.at("tokens"), bucket_bytes = 25 * double(1 << 20);
  if (given) {
    run::RunConfig config = *given;
    config.parallel.expert = layout.expert, config.parallel.shard_base = layout.shard_base, config.parallel.shard_optimizer = layout.shard_optimizer;
    request = train::memory_request(spec, config, vocabulary, device, layout.processes());
    micro_batches = config.train.accumulation;
    tokens = double(config.data.tokens_per_step);
    bucket_bytes = config.parallel.bucket_mib * double(1 << 20);
  } else {
    MOEGRAFT_CHECK(step.at("active_parameters") == spec.num_active_parameters(), "--measured: the step is of another model (", step.at("active_parameters").get<int64_t>(), " active parameters, here ",
                   spec.num_active_parameters(), "); give -c CONFIG to plan for a model by the measured speed of another");
    device = std::string(step.at("device")).starts_with("cuda") ? at::kCUDA : at::kCPU;
    request = request_of_step(step, spec, device, layout);
  }
  request.free_bytes = model::free_memory(device).value_or(0);
  const train::MemoryPlan memory = train::plan_memory(request);
  if (given) recompute = memory.recompute_layers;
  train::MemoryRequest average = request;  // the largest micro-batch is for memory, the mean one for time
  average.tokens = std::max<int64_t>(1, std::llround(tokens / double(layout.processes() * micro_batches)));
  const auto traffic = train::count_traffic(average, micro_batches, recompute, bucket_bytes);
  const bool overlap = std::string(step.at("device")).starts_with("cuda");
  const ClusterTimes times = predict(measured, average, traffic, layout, micro_batches, overlap);
  train::MemoryRequest one = average;
  one.expert_size = one.data_size = 1, one.tokens = std::max<int64_t>(1, std::llround(tokens / double(micro_batches)));
  const double alone = predict(measured, one, {}, {}, micro_batches, overlap).step();
  Json bytes;
  for (const Purpose p : {Purpose::gradients, Purpose::experts, Purpose::base, Purpose::updates, Purpose::agreement}) bytes[train::name_of(p)] = train::total_bytes(traffic, p);
  Json out{{"nodes", layout.nodes}, {"processes", layout.processes()}, {"expert", layout.expert}, {"data", layout.processes() / layout.expert}, {"shard_base", layout.shard_base}, {"shard_optimizer", layout.shard_optimizer},
           {"tokens_per_step", tokens}, {"step_seconds", times.step()}, {"tokens_per_s", tokens / times.step()}, {"compute_seconds", times.compute}, {"communication_share", times.exposed / times.step()},
           {"times_one_process", alone / times.step()},
           {"seconds_under_way", {{"gradients", times.gradients}, {"experts", times.experts}, {"base", times.base}, {"updates", times.updates}, {"agreement", times.agreement}}},
           {"step_traffic_bytes", bytes}, {"process_memory_bytes", memory.total()}, {"recompute_layers", memory.recompute_layers}};
  if (layout.nodes > 1 && !measured.measured_between_nodes()) out["note"] = "no exchange between machines was measured: their network is taken to be as fast as the links within one";
  return out;
}

}  // namespace moegraft::tools
