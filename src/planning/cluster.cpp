#include "moegraft/planning/cluster.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "moegraft/base/check.h"

namespace moegraft::planning {
namespace {

using io::Json;

// Rounds of messages, each a latency: rings, and a tree for broadcast.
double rounds(Collective collective, int64_t n) {
  switch (collective) {
    case Collective::all_reduce: return 2 * double(n - 1);
    case Collective::broadcast: return std::ceil(std::log2(double(n)));
    default: return double(n - 1);
  }
}
// Bytes that pass the busiest link per byte of the message, in the benchmark's units (all_gather: per byte of what is
// collected).
double link_share(Collective collective, int64_t n) {
  const double others = double(n - 1) / double(n);
  return collective == Collective::all_reduce ? 2 * others : collective == Collective::broadcast ? 1 : others;
}

// Milliseconds at `bytes` from points sorted by bytes: linear between them, flat below the first, at the last one's
// rate beyond it.
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
  const double total =
      f.at("forward").get<double>() + f.at("activation_gradient").get<double>() + f.at("lora").get<double>();
  return layers_share * (f.at("forward").get<double>() + f.at("lora").get<double>() / 3) / total;
}

}  // namespace

Measurements::Measurements(const std::vector<std::string>& files) {
  for (const auto& file : files) {
    const Json whole = io::read_json(file);
    const Json list = whole.contains("measured") ? whole.at("measured") : Json::array({whole});
    MOEGRAFT_CHECK(list.is_array(), file, ": \"measured\" must be a list");
    for (const auto& j : list) {
      const std::string kind = j.is_object() ? j.value("bench", "") : "";
      MOEGRAFT_CHECK(
          kind == "step" || kind == "collectives", file,
          " is not the output of bench collectives --json, of bench step --json or of tools/bench_scaling.sh");
      if (kind == "step" && j.value("processes", 0) == 1) steps_.push_back(j);
      if (kind == "collectives" && j.value("processes", 0) > 1) collectives_.push_back(j);
    }
  }
  MOEGRAFT_CHECK(
      !steps_.empty(),
      "--measured: the step time of one process is missing: add the output of moegraft bench step MODEL --json");
  std::sort(steps_.begin(), steps_.end(), [](const Json& a, const Json& b) { return a.at("tokens") > b.at("tokens"); });
  const auto same = [&](const char* key) {
    return std::all_of(steps_.begin(), steps_.end(), [&](const Json& j) { return j.at(key) == steps_[0].at(key); });
  };
  for (const char* key : {"dtype", "rank", "gate", "sites", "active_parameters", "threads", "device"})
    MOEGRAFT_CHECK(same(key), "--measured: the steps of one process differ in ", key,
                   "; they may differ in tokens only");
}

double Measurements::compute_seconds(double tokens) const {
  std::vector<std::pair<double, double>> points;  // tokens, seconds
  for (const auto& j : steps_)
    points.insert(points.begin(), {j.at("tokens").get<double>(), j.at("median_step_s").get<double>()});
  if (tokens < points.front().first) return points.front().second * tokens / points.front().first;
  return interpolate(points, tokens);
}

bool Measurements::measured_between_nodes() const {
  return std::any_of(collectives_.begin(), collectives_.end(), [](const Json& j) { return j.value("nodes", 1) > 1; });
}

double Measurements::seconds(Collective collective, double bytes, int64_t members, bool between_nodes) const {
  if (members == 1 || bytes == 0) return 0;
  MOEGRAFT_CHECK(!collectives_.empty(),
                 "--measured: exchanges between processes are missing: add the output of moegraft launch --nproc N -- "
                 "bench collectives --json");
  const auto distance = [&](const Json& j) {
    return std::pair(between_nodes != (j.value("nodes", 1) > 1),
                     std::abs(std::log(double(members) / j.at("processes").get<double>())));
  };
  const Json& nearest = *std::min_element(collectives_.begin(), collectives_.end(),
                                          [&](const Json& a, const Json& b) { return distance(a) < distance(b); });
  const int64_t n = nearest.at("processes");
  std::vector<std::pair<double, double>> points;
  for (const auto& one : nearest.at("collectives"))
    if (one.at("op") == name_of(collective))
      points.emplace_back(one.at("bytes").get<double>(), one.at("ms").get<double>());
  MOEGRAFT_CHECK(!points.empty(), "--measured: ", name_of(collective),
                 " was not measured; run bench collectives without --only");
  std::sort(points.begin(), points.end());
  if (collective == Collective::all_gather) bytes *= double(members);  // the benchmark counts what is collected
  // The same bytes on the busiest link as in the measured group.
  const double latency = points.front().second,
               alike = bytes * link_share(collective, members) / link_share(collective, n);
  const double carried = interpolate(points, alike) - latency;
  return (latency * rounds(collective, members) / rounds(collective, n) + std::max(carried, 0.0)) / 1e3;
}

ClusterTimes predict(const Measurements& measured, const MemoryRequest& r, const std::vector<Message>& traffic,
                     const ClusterLayout& layout, int64_t micro_batches, bool overlap) {
  ClusterTimes times;
  const Json& step = measured.step();
  const double size = double(r.spec.num_active_parameters()) / step.at("active_parameters").get<double>();
  double compute = measured.compute_seconds(double(r.tokens)) * size * double(micro_batches);
  if (r.shard_base && r.data_size > 1) compute *= 1 + recomputed_share(step, 1.0);
  // More threads than cores take turns.
  if (r.device.is_cpu())
    compute *= std::max(1.0, double(layout.gpus) * step.at("threads").get<double>() / step.at("cores").get<double>());
  times.compute = compute;
  for (const auto& m : traffic) {
    const int64_t members = m.group == Group::world    ? layout.processes()
                            : m.group == Group::expert ? layout.expert
                                                       : layout.processes() / layout.expert;
    const bool between = m.group == Group::expert ? layout.expert > layout.gpus : layout.nodes > 1;
    const double seconds = m.calls * measured.seconds(m.collective, m.bytes_each, members, between);
    switch (m.purpose) {
      case Purpose::gradients: times.gradients += seconds; break;
      case Purpose::experts: times.experts += seconds; break;
      case Purpose::base: times.base += seconds; break;
      case Purpose::updates: times.updates += seconds; break;
      case Purpose::agreement: times.agreement += seconds; break;
    }
  }
  // Beside the computing: gradients behind the last backward pass (two thirds of a step), gathers of layers behind all
  // of it. What it cannot hide remains.
  const double backward = compute / double(micro_batches) * 2 / 3;
  const double gradients = overlap ? std::max(0.0, times.gradients - backward) : times.gradients;
  const double base = overlap ? std::max(0.0, times.base - compute) : times.base;
  times.exposed = gradients + base + times.experts + times.updates + times.agreement;
  return times;
}

}  // namespace moegraft::planning
