// moegraft bench step: a whole LoRA training step on all experts. By default the gate is open, every token is labelled and nothing is skipped: what
// transformers + PEFT would do.
#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/device.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::tools::bench {
namespace {

struct StepOptions {
  ModelOptions model;
  std::string ids, gate, lengths = "fixed", labels = "all";
  int64_t batch = 4, seq = 512, steps = 5, threads = 0, codes = 1024, recompute = 0, matmul = 0;
  double image_share = 0;
  bool whole_backward = false, profile = false, json = false;
};

model::Gate choose_gate(const StepOptions& o) {
  const std::string name = !o.gate.empty() ? o.gate : o.image_share > 0 ? "modality" : "all";
  if (name == "all") return model::Gate::all;
  if (name == "none") return model::Gate::none;
  MOEGRAFT_CHECK_USAGE(name == "modality", "--gate must be all, modality or none, got ", name);
  MOEGRAFT_CHECK_USAGE(o.image_share > 0, "--gate modality: without image tokens nothing trains; give --image-share above 0");
  return model::Gate::modality;
}

at::Tensor load_ids(const StepOptions& o, int64_t vocab) {
  if (o.ids.empty()) return random_ids({o.batch, o.seq}, vocab);
  const io::SafetensorsFile file(o.ids);
  const at::Tensor ids = file.tensor("input_ids");
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong, o.ids, ": input_ids must be int64 [batch, seq], got ", ids.sizes().vec());
  MOEGRAFT_CHECK(ids.size(0) >= 1 && ids.size(1) >= 2, o.ids, ": input_ids must hold at least 1 sequence of 2 tokens, got ", ids.sizes().vec());
  return ids.clone();
}

// Where sequences end: rows of equal length, or lengths drawn from [S/4, S] until all tokens are used.
std::vector<int64_t> sequence_ends(const StepOptions& o, int64_t B, int64_t S) {
  std::vector<int64_t> ends{0};
  Rng rng(0, "bench.lengths");
  const int64_t shortest = std::max<int64_t>(2, S / 4);
  while (ends.back() < B * S) {
    int64_t length = o.lengths == "fixed" ? S : shortest + int64_t(rng.below(uint64_t(S - shortest + 1)));
    if (B * S - ends.back() - length < 2) length = B * S - ends.back();  // no rest of one token, which has nothing to predict
    ends.push_back(ends.back() + length);
  }
  return ends;
}

// Each sequence: text, then a picture's begin and codes as its last tokens. With the gate closed the first token is a new row, so that gradients still
// flow through every layer and position: the frozen base with activation gradients alone.
// o.batch and o.seq become those of the ids.
model::PackedBatch make_batch(StepOptions& o, model::Gate gate, const graft::GraftedModel& m) {
  const at::Tensor ids_BS = load_ids(o, m.decoder->spec().vocab_size);
  const int64_t B = o.batch = ids_BS.size(0), S = o.seq = ids_BS.size(1), T = B * S;
  model::PackedBatch batch;
  batch.ids_T = ids_BS.reshape({-1}).contiguous();
  batch.cu_seqlens = sequence_ends(o, B, S);
  batch.positions_T = at::empty({T}, at::kLong);
  batch.labels_T = at::empty({T}, at::kLong);
  at::Tensor modality = at::zeros({T}, at::kLong);
  int64_t *ids = batch.ids_T.data_ptr<int64_t>(), *positions = batch.positions_T.data_ptr<int64_t>(), *labels = batch.labels_T.data_ptr<int64_t>(), *mod = modality.data_ptr<int64_t>();
  Rng rng(0, "bench.codes");
  const auto make_image = [&](int64_t t, bool begin) {
    const model::ModalityTokens& tokens = m.vocabulary.modalities.front();
    ids[t] = begin ? tokens.begin_id() : tokens.code_id(int64_t(rng.below(uint64_t(tokens.num_codes))));
    mod[t] = tokens.modality;
  };
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    const int64_t image = o.image_share > 0 ? std::max<int64_t>(1, std::llround(o.image_share * double(end - begin))) : 0;
    for (int64_t t = end - image; t < end; ++t) make_image(t, t == end - image);
    if (gate == model::Gate::none && mod[begin] == 0) make_image(begin, true);
    for (int64_t t = begin; t < end; ++t) {
      positions[t] = t - begin;
      const bool labelled = t + 1 < end && (o.labels == "all" || mod[t + 1] != 0);
      labels[t] = labelled ? ids[t + 1] : model::kNoLabel;
    }
  }
  if (!m.vocabulary.modalities.empty()) batch.modality_T = modality;
  batch.facts = std::make_shared<model::BatchFacts>(model::describe_batch(batch, m.decoder->id_bounds()));  // in training the data worker's
  return model::to_device(batch, m.device());
}

void print(const Json& j) {
  const double best = j["best_step_s"].get<double>();
  std::printf("%.0f tokens/s, best step %.4f s (median %.4f s), peak %.0f MiB\n", j["tokens_per_s"].get<double>(), best, j["median_step_s"].get<double>(), j["peak_mib"].get<double>());
  std::printf("%.1f MFLOP per token, %.1f GF/s of %.1f GF/s that a large product reaches here: %.0f %%\n", j["flops_per_token"].get<double>() / 1e6, j["model_gflops_per_s"].get<double>(),
              j["matmul_gflops"].get<double>(), 100 * j["share_of_limit"].get<double>());
  std::printf("loss");
  for (const auto& loss : j["loss"]) std::printf(" %.6f", loss.get<double>());
  std::printf("\n");
  if (j.contains("profile")) {
    std::printf("\none more step, with every operation on the clock: %.4f s\n", j["profile"]["total_s"].get<double>());
    OpProfile::print(j["profile"], 25);
  }
}

void run(const StepOptions& given) {
  StepOptions o = given;
  const model::Gate gate = choose_gate(o);
  MOEGRAFT_CHECK_USAGE(o.labels == "all" || o.image_share > 0, "--labels image: there are no image tokens; give --image-share above 0");
  model::ForwardOptions forward;
  forward.gate = gate;
  forward.recompute_layers = o.recompute;
  forward.frozen_prefix = !o.whole_backward;
  set_threads(o.threads);
  o.model.codes = o.image_share > 0 || gate == model::Gate::none ? o.codes : 0;
  if (gate == model::Gate::none) o.model.rank = 0;
  graft::GraftedModel m = open_model(o.model);
  const at::Device device = m.device();
  const at::ScalarType dtype = m.decoder->dtype();
  const model::PackedBatch batch = make_batch(o, gate, m);
  const int64_t T = batch.num_tokens();
  std::map<std::string, train::GroupOptions> groups;
  for (const auto& p : m.registry->all()) groups[p.group] = {1e-4, 0.01};
  train::AdamW optimizer(*m.registry, groups, {0.9, 0.999, 1e-8});
  double limit = matmul_gflops(dtype, device, o.matmul);

  std::vector<double> times, losses;
  const auto step = [&](const std::function<void(const char*)>& phase) {
    phase("forward");
    m.registry->zero_grad();
    const auto result = m.decoder->forward(batch, forward);
    phase("loss");
    const auto loss = model::cross_entropy_loss(*m.decoder, result, batch);
    phase("backward");
    loss.loss.backward();
    phase("optimizer");
    optimizer.step(1.0);
    return loss.loss;
  };
  for (int64_t i = 0; i < o.steps; ++i) {
    synchronize(device);
    const auto start = Clock::now();
    const at::Tensor loss = step([](const char*) {});
    synchronize(device);
    times.push_back(since(start));
    losses.push_back(loss.item<double>());
  }
  const PeakMemory peak = peak_memory(device);
  Json profile;
  if (o.profile) {
    OpProfile ops(device);
    step([&](const char* name) { ops.phase(name); });
    profile = ops.finish();
  }
  limit = std::max(limit, matmul_gflops(dtype, device, o.matmul));

  const double best = *std::min_element(times.begin(), times.end());
  const StepWork work = count_work(m, batch, gate, o.model);
  const double images = batch.modality_T.defined() ? double((batch.modality_T != 0).sum().item<int64_t>()) : 0;
  Json out{{"tool", "moegraft"},
           {"tokens_per_s", double(T) / best},
           {"step_s", times},
           {"best_step_s", best},
           {"median_step_s", median(times)},
           {"loss", losses},
           {"peak_mib", device.is_cuda() ? peak.device_mib : peak.rusage_mib},
           {"host_peak_mib", peak.rusage_mib},
           {"vm_hwm_mib", peak.high_water_mib},
           {"matmul_gflops", limit},
           {"flops_per_token", work.total() / double(T)},
           {"flops", {{"forward", work.forward}, {"activation_gradient", work.activation_gradient}, {"lora", work.lora}, {"attention_scores_not_counted", work.attention_scores}}},
           {"model_gflops_per_s", work.total() / best / 1e9},
           {"share_of_limit", work.total() / best / 1e9 / limit},
           {"dtype", o.model.dtype},
           {"tokens", T},
           {"sequences", batch.num_sequences()},
           {"batch", o.batch},
           {"seq", o.seq},
           {"lengths", o.lengths},
           {"gate", gate == model::Gate::all ? "all" : gate == model::Gate::none ? "none" : "modality"},
           {"image_share", images / double(T)},
           {"labels", o.labels},
           {"rank", o.model.rank},
           {"sites", o.model.sites},
           {"quantize", o.model.quantize},
           {"recompute_layers", o.recompute},
           {"frozen_prefix", forward.frozen_prefix},
           {"trained_parameters", m.registry->num_elements()},
           {"threads", at::get_num_threads()},
           {"device", device.str()}};
  if (!profile.is_null()) out["profile"] = std::move(profile);
  if (o.json) std::cout << out.dump() << '\n';
  else print(out);
}

}  // namespace

std::function<void()> add_step_options(CLI::App& cmd) {
  auto o = std::make_shared<StepOptions>();
  add_model_options(cmd, o->model);
  cmd.add_option("--batch", o->batch, "Sequences")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  cmd.add_option("--seq", o->seq, "Tokens of a sequence")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  cmd.add_option("--lengths", o->lengths, "fixed, or ragged: the same tokens packed as sequences of seq/4 to seq")->check(CLI::IsMember({"fixed", "ragged"}))->capture_default_str();
  cmd.add_option("--image-share", o->image_share, "Share of each sequence that is a made-up modality's tokens, at its end")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  cmd.add_option("--codes", o->codes, "Codebook of that modality")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  cmd.add_option("--gate", o->gate, "Rows that LoRA acts on: all, modality, none (default: all, or modality with image tokens)");
  cmd.add_option("--labels", o->labels, "Tokens to predict: all, or image")->check(CLI::IsMember({"all", "image"}))->capture_default_str();
  cmd.add_option("--recompute", o->recompute, "Layers, from the first, that run again in the backward pass instead of keeping their activations")->check(CLI::Range(0, 1 << 20))->capture_default_str();
  cmd.add_flag("--whole-backward", o->whole_backward, "Record gradients for the text before the first image token too, which needs none");
  cmd.add_option("--steps", o->steps, "Steps to time; the best counts")->check(CLI::Range(1, 100000))->capture_default_str();
  cmd.add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd.add_option("--ids", o->ids, "safetensors with input_ids int64 [batch, seq] instead of random ids");
  cmd.add_option("--matmul", o->matmul, "Rows and columns of the product that stands for the machine's limit; 0: 2048, or 8192 on a GPU")->check(CLI::Range(0, 1 << 16));
  cmd.add_flag("--profile", o->profile, "One more step with every operation on the clock");
  cmd.add_flag("--json", o->json, "One JSON object on stdout");
  cmd.footer("Example: moegraft bench step models/base --batch 4 --seq 512 --dtype bfloat16 --rank 16 --steps 5 --profile");
  return [o] { run(*o); };
}

}  // namespace moegraft::tools::bench
