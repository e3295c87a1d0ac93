// moegraft inspect: what a model or run is made of. Reads headers and configs; weights stay on disk.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "cluster_plan.h"
#include "command.h"
#include "cpu.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/config/config.h"
#include "moegraft/graft/calibration.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/json.h"
#include "moegraft/kernels/device_numerics.h"
#include "moegraft/model/device.h"
#include "moegraft/model/stop_ids.h"
#include "moegraft/model/weights.h"
#include "moegraft/planning/memory.h"
#include "moegraft/run/records.h"
#include "moegraft/run/run_dir.h"
#include "vocabulary.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

struct Options {
  std::string path, config, plan, device;
  std::vector<std::string> set, measured;
  int64_t codebook = 0;
  double budget = 0;
  bool json = false;
};

Json describe_spec(const model::DecoderSpec& s) {
  int64_t sparse = 0, window = 0;
  for (const auto& layer : s.layers) sparse += layer.sparse, window = std::max(window, layer.sliding_window);
  Json out{{"family", s.family},
           {"layers", s.num_layers},
           {"sparse_layers", sparse},
           {"hidden_size", s.hidden_size},
           {"heads", s.num_heads},
           {"kv_heads", s.num_kv_heads},
           {"head_dim", s.head_dim},
           {"experts", s.num_experts},
           {"experts_per_token", s.num_experts_per_tok},
           {"expert_width", s.moe_intermediate_size},
           {"vocab_size", s.vocab_size},
           {"tied", s.tie_word_embeddings},
           {"sliding_window", window},
           {"rope", s.rope.type},
           {"bos_id", s.bos_id},
           {"eos_id", s.eos_id},
           {"parameters", s.num_parameters()},
           {"active_parameters", s.num_active_parameters()}};
  if (sparse < s.num_layers) out["dense_width"] = s.intermediate_size;
  if (s.shared_expert.intermediate_size > 0) out["shared_expert_width"] = s.shared_expert.intermediate_size;
  if (s.has_experts())
    out["router"] = std::string(s.router.score == model::RouterSpec::Score::sigmoid ? "sigmoid" : "softmax") +
                    (s.router.correction_bias ? ", corrected" : "") +
                    (s.router.num_groups > 1
                         ? moegraft::detail::concat(", ", s.router.topk_groups, " of ", s.router.num_groups, " groups")
                         : "");
  return out;
}

Json describe_plan(const planning::MemoryPlan& p, at::Device device) {
  const auto largest = [](const std::vector<int64_t>& v) {
    return v.empty() ? 0 : *std::max_element(v.begin(), v.end());
  };
  Json out{{"device", device.str()},
           {"program_bytes", p.program},
           {"base_bytes", p.base},
           {"packed_base_bytes", p.panels},
           {"trained_bytes", p.trained},
           {"gradient_bytes", p.gradients},
           {"optimizer_bytes", p.optimizer},
           {"activation_bytes", p.activations},
           {"loss_bytes", p.loss},
           {"workspace_bytes", p.workspace},
           {"heap_bytes", p.heap},
           {"save_copy_bytes", p.save_copies},
           {"prefix_cache_bytes", p.prefix_cache},
           {"layer_bytes", largest(p.layer_stored)},
           {"recomputed_layer_bytes", largest(p.layer_recomputed)},
           {"recompute_layers", p.recompute_layers},
           {"total_bytes", p.total()},
           {"smallest_total_bytes", p.smallest}};
  if (p.host_experts) out["offload_buffer_bytes"] = p.offload_buffers, out["host_expert_bytes"] = p.host_experts;
  if (p.collectives) out["collective_bytes"] = p.collectives;
  if (p.budget) out["budget_bytes"] = p.budget, out["fits"] = p.fits();
  if (!p.budget_source.empty()) out["budget"] = p.budget_source;
  if (!p.budget && !device.is_cpu())
    out["budget"] = "not known: there is no such device here; --budget GIB plans for one";
  return out;
}

// Before step 0 of a new run: memory of the host, and what the GW solves cost where there are any.
Json describe_calibration(const graft::CalibrationPlan& plan, const ot::OtConfig& ot) {
  Json out{{"tokens", ot.calibration_tokens},
           {"rows_per_expert", plan.rows},
           {"host_bytes", plan.bytes},
           {"solves", plan.num_solves()}};
  if (plan.solves.empty()) return out;
  out["solve_seconds"] = std::round(10 * graft::estimate_solve_seconds(plan, ot)) / 10;
  out["solve_seconds_are"] =
      moegraft::detail::concat("of ", at::get_num_threads(),
                               " threads here: one solve of each width timed on random states, times their number");
  return out;
}

void print(const Json& j, int indent) {
  for (const auto& [key, value] : j.items()) {
    if (value.is_object()) {
      std::printf("%*s%s\n", indent, "", key.c_str());
      print(value, indent + 2);
    } else if (value.is_array() && !value.empty() && value.front().is_object()) {
      for (const auto& item : value) {
        std::printf("%*s%s\n", indent, "", key.c_str());
        print(item, indent + 2);
      }
    } else if (key.find("bytes") != std::string::npos) {
      std::printf("%*s%-28s %.2f GiB\n", indent, "", key.c_str(), value.get<double>() / double(1 << 30));
    } else if (value.is_number_integer() && value.get<int64_t>() > 99999) {
      std::printf("%*s%-28s %s (%lld)\n", indent, "", key.c_str(), format_count(value.get<double>()).c_str(),
                  static_cast<long long>(value.get<int64_t>()));
    } else {
      std::printf("%*s%-28s %s\n", indent, "", key.c_str(),
                  value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    }
  }
}

void run(const Options& o) {
  MOEGRAFT_CHECK_USAGE(o.plan.empty() == o.measured.empty(),
                       "inspect: --plan LAYOUT needs --measured FILE, and the other way round");
  Json out;
  std::optional<run::RunConfig> config;
  fs::path run_dir;
  if (!o.config.empty()) {
    config = config::parse<run::RunConfig>(config::Document::from_file(o.config, o.set));
  } else {
    MOEGRAFT_CHECK_USAGE(!o.path.empty(), "inspect: give a model or run directory, or -c CONFIG");
    if (run::is_run(o.path)) config = run::load_run_config(o.path), run_dir = o.path;
  }
  MOEGRAFT_CHECK_USAGE(config || (o.device.empty() && o.budget == 0),
                       "inspect: --device and --budget plan a run: give -c CONFIG or a run directory");
  if (!o.device.empty()) config->model.device = config::parse_choice<config::Device>("--device", o.device);
  MOEGRAFT_CHECK_USAGE(o.budget <= 1e6, "--budget must be at most 1e6 GiB, got ", o.budget);
  if (o.budget > 0) config->train.memory_budget_gib = o.budget;
  if (config && config->model.init) {
    MOEGRAFT_CHECK(!run_dir.empty() && fs::exists(run_dir / "model"),
                   "this config trains a base from scratch; inspect its `model` folder once it is trained");
    out["model"] = describe_spec(model::read_spec(run_dir / "model"));
  } else {
    MOEGRAFT_CHECK_USAGE(o.config.empty() || o.path.empty(), "inspect: -c ", o.config, " names its own base; leave ",
                         o.path, " out, or give it as --set model.path=", o.path);
    const fs::path base = config ? config->model.path : o.path;
    const model::DecoderSpec s = model::read_spec(base);
    out["model"] = describe_spec(s);
    if (const auto ids = model::read_eos_ids(base); ids.size() > 1) out["model"]["eos_ids"] = ids;
    if (!config && !o.plan.empty()) out["cluster"] = plan_cluster(s, {}, {}, at::kCPU, o.plan, o.measured);
    if (config) {
      const auto stored = run_dir.empty() ? std::nullopt : graft::read_vocabulary(run_dir);
      const model::Vocabulary v =
          stored ? *stored : vocabulary_of({s.vocab_size, s.bos_id, s.eos_id, {}}, config->modalities, o.codebook);
      // A plan for a GPU needs none.
      const at::Device planned_on =
          config->model.device == config::Device::cuda ? at::Device(at::kCUDA) : graft::device_of(config->model.device);
      planning::MemoryRequest request = planning::memory_request(s, *config, v, planned_on);
      request.free_bytes = model::free_memory(planned_on).value_or(0);
      const planning::TrainedParameters t = planning::count_trained(request);
      const int64_t trained = t.total();
      out["trained"] = {
          {"lora", t.lora},
          {"rows", t.rows},
          {"total", trained},
          {"share_percent", std::round(1e4 * double(trained) / double(s.num_parameters() + trained)) / 100}};
      const auto table = planning::trained_table(request);
      if (!table.empty()) out["trained"]["table"] = io::Json::parse(run::to_json(table));
      if (!o.json)
        for (const auto& line : planning::format_trained(table, s.num_parameters()))
          std::printf("trains  %s\n", line.c_str());
      const planning::MemoryPlan memory = planning::plan_memory(request);
      out["memory"] = describe_plan(memory, planned_on);
      if (!memory.fits()) log::warning(planning::fit_problem(memory, request));
      if (const auto plan = graft::plan_calibration(s, *config); plan.rows > 0 && run_dir.empty())
        out["calibration"] = describe_calibration(plan, config->ot);
      if (!o.plan.empty()) out["cluster"] = plan_cluster(s, config, v, planned_on, o.plan, o.measured);
      for (const auto& m : v.modalities)
        out["modalities"].push_back({{"name", m.name},
                                     {"begin_id", m.begin_id()},
                                     {"end_id", m.end_id()},
                                     {"first_code_id", m.code_id(0)},
                                     {"last_code_id", m.code_id(m.num_codes - 1)},
                                     {"codes_per_item", m.item_length},
                                     {"codebooks", m.codebooks}});
    }
  }
  out["cpu"] = describe_cpu();
  if (const std::string attention = kernels::describe_device_attention(); !attention.empty())
    out["gpu"] = {{"attention", attention}};
  if (o.json)
    std::cout << out.dump() << '\n';
  else
    print(out, 0);
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand(
      "inspect", "Architecture, parameters, memory plan and token ids of a model, a run or a config");
  cmd->add_option("path", o->path, "Hugging Face directory or run");
  cmd->add_option("-c,--config", o->config, "A run's YAML that has not started: a dry run");
  cmd->add_option("--set", o->set, "Override a key of the config")->take_all()->allow_extra_args(false);
  cmd->add_option("--codebook", o->codebook, "Codebook size to assume when the codec is not there yet")
      ->check(CLI::Range(1, 1 << 30));
  cmd->add_option("--device", o->device,
                  "Plan for this device instead of the config's; a plan for cuda needs none here")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  cmd->add_option("--budget", o->budget,
                  "Plan for so many GiB of its memory (train.memory_budget_gib); default: what the device has free, "
                  "where it is here")
      ->check(positive());
  cmd->add_option("--plan", o->plan,
                  "Predict the step time of nodes=N,gpus=M[,expert=E][,shard_base=true][,shard_optimizer=true] (gpus: "
                  "processes of a node)");
  cmd->add_option("--measured", o->measured,
                  "What --plan reckons with: outputs of bench collectives --json and of bench step --json by one "
                  "process (repeatable)")
      ->take_all()
      ->allow_extra_args(false);
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer(
      "Example: moegraft inspect -c configs/qwen3-30b-a3b.yaml --set model.path=/models/Qwen3-30B-A3B --codebook 16384 "
      "--device cuda --budget 74\n"
      "         moegraft inspect MODEL --plan nodes=4,gpus=8,expert=8 --measured collectives.json --measured "
      "step.json");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools
