// Where the time of a step goes, from ATen's own record of operations.
#include <ATen/record_function.h>
#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

#include "bench.h"
#include "moegraft/base/check.h"

namespace moegraft::tools::bench {
namespace {

struct Row {
  int64_t calls = 0;
  double self_s = 0;
};
struct Phase {
  std::string name;
  double s = 0, marked_s = 0;
  Clock::time_point begin;
};

// The callbacks are plain functions, so what they write to is process-wide.
struct Recording {
  std::mutex mutex;
  at::Device device{at::kCPU};
  std::vector<Phase> phases;
  std::map<std::pair<size_t, std::string>, Row> rows;  // by (phase, operation)
  at::CallbackHandle handle{};
};
Recording* recording = nullptr;

struct Frame : at::ObserverContext {
  Clock::time_point begin;
  double children_s = 0;
  Frame* parent = nullptr;
};
thread_local Frame* innermost = nullptr;

// "torch::autograd::CppNode<moegraft::kernels::(anonymous namespace)::RmsNorm>" -> "RmsNorm (backward node)"
std::string short_name(std::string name) {
  const std::string node = "CppNode<";
  if (const size_t at = name.find(node); at != std::string::npos) {
    std::string type = name.substr(at + node.size());
    const size_t end = type.rfind('>');
    const std::string rest = end == std::string::npos ? "" : type.substr(end + 1);
    type = type.substr(0, end);
    if (const size_t scope = type.rfind("::"); scope != std::string::npos) type = type.substr(scope + 2);
    return (at > 0 && name.starts_with("autograd::engine") ? "engine: " : "") + type + " (backward node)" + rest;
  }
  const std::string engine = "autograd::engine::evaluate_function: ";
  return name.starts_with(engine) ? "engine: " + name.substr(engine.size()) : name;
}

std::unique_ptr<at::ObserverContext> on_begin(const at::RecordFunction&) {
  // A worker's share of a parallel loop runs while the operation that started the loop is on the clock.
  if (!recording || at::in_parallel_region()) return nullptr;
  auto frame = std::make_unique<Frame>();
  frame->parent = innermost;
  innermost = frame.get();
  synchronize(recording->device);
  frame->begin = Clock::now();
  return frame;
}

void on_end(const at::RecordFunction& function, at::ObserverContext* context) {
  if (!context || !recording) return;
  auto* frame = static_cast<Frame*>(context);
  synchronize(recording->device);
  const double inclusive = seconds_since(frame->begin);
  innermost = frame->parent;
  if (frame->parent) frame->parent->children_s += inclusive;
  const std::lock_guard lock(recording->mutex);
  if (recording->phases.empty()) return;
  if (!frame->parent) recording->phases.back().marked_s += inclusive;
  Row& row = recording->rows[{recording->phases.size() - 1, short_name(function.name())}];
  row.calls += 1;
  row.self_s += inclusive - frame->children_s;
}

}  // namespace

OpProfile::OpProfile(at::Device device) {
  MOEGRAFT_INVARIANT(!recording, "one profile at a time");
  recording = new Recording;
  recording->device = device;
  recording->handle = at::addGlobalCallback(
      at::RecordFunctionCallback(on_begin, on_end)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION, at::RecordScope::USER_SCOPE}));
}

OpProfile::~OpProfile() {
  at::removeCallback(recording->handle);
  delete recording;
  recording = nullptr;
}

void OpProfile::phase(const std::string& name) {
  synchronize(recording->device);
  auto& phases = recording->phases;
  if (!phases.empty()) phases.back().s = seconds_since(phases.back().begin);
  phases.push_back({name, 0, 0, Clock::now()});
}

Json OpProfile::finish() {
  synchronize(recording->device);
  auto& phases = recording->phases;
  if (!phases.empty()) phases.back().s = seconds_since(phases.back().begin);
  double total = 0;
  Json out{{"phases", Json::array()}, {"ops", Json::array()}};
  for (const Phase& phase : phases) {
    total += phase.s;
    out["phases"].push_back({{"name", phase.name}, {"s", phase.s}, {"unmarked_s", phase.s - phase.marked_s}});
  }
  out["total_s"] = total;
  std::vector<std::pair<std::pair<size_t, std::string>, Row>> rows(recording->rows.begin(), recording->rows.end());
  std::stable_sort(rows.begin(), rows.end(),
                   [](const auto& a, const auto& b) { return a.second.self_s > b.second.self_s; });
  for (const auto& [key, row] : rows)
    out["ops"].push_back({{"op", key.second},
                          {"phase", phases[key.first].name},
                          {"calls", row.calls},
                          {"self_s", row.self_s},
                          {"share", row.self_s / total}});
  return out;
}

void OpProfile::print(const Json& profile, size_t count) {
  std::vector<std::vector<std::string>> phases, rows;
  for (const auto& p : profile["phases"])
    phases.push_back({p["name"], fixed(1e3 * p["s"].get<double>(), 1), fixed(1e3 * p["unmarked_s"].get<double>(), 1),
                      fixed(100 * p["s"].get<double>() / profile["total_s"].get<double>(), 1)});
  print_table({"phase", "ms", "outside any op", "%"}, phases);
  std::printf("\n");
  for (const auto& op : profile["ops"]) {
    if (rows.size() == count) break;
    rows.push_back({op["op"], op["phase"], std::to_string(op["calls"].get<int64_t>()),
                    fixed(1e3 * op["self_s"].get<double>(), 2), fixed(100 * op["share"].get<double>(), 1)});
  }
  print_table({"op", "phase", "calls", "self ms", "%"}, rows);
}

}  // namespace moegraft::tools::bench
