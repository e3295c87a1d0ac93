// moegraft bench step: a whole LoRA training step on all experts. By default the gate is open, every token is labelled
// and nothing is skipped: what transformers + PEFT would do. Under a launcher the processes share each batch, and the
// figures are of all together. What a run of `train` does beside that can be added: accumulation, clipping, 8-bit
// moments, routing statistics.
#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>

#include "bench.h"
#include "kernel_record.h"
#include "moegraft/adapters/sites.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/device.h"
#include "moegraft/parallel/part.h"
#include "moegraft/planning/work.h"
#include "moegraft/routing/stats.h"
#include "moegraft/train/distributed_step.h"

namespace moegraft::tools::bench {
namespace {

struct StepOptions {
  ModelOptions model;
  std::string ids, gate, save, lengths = "fixed", labels = "all", optimizer = "adamw";
  int64_t batch = 4, seq = 512, accumulate = 1, steps = 5, threads = 0, codes = 1024, recompute = 0, matmul = 0;
  double image_share = 0, clip = 0;
  int64_t expert_parallel = 1;
  bool shard_base = false, shard_optimizer = false;
  double bucket_mib = 25;
  bool whole_backward = false, routing = false, profile = false, kernels = false, json = false;
};

model::Gate choose_gate(const StepOptions& o) {
  const std::string name = !o.gate.empty() ? o.gate : o.image_share > 0 ? "modality" : "all";
  if (name == "all") return model::Gate::all;
  if (name == "none") return model::Gate::none;
  MOEGRAFT_CHECK_USAGE(name == "modality", "--gate must be all, modality or none, got ", name);
  MOEGRAFT_CHECK_USAGE(o.image_share > 0,
                       "--gate modality: without image tokens nothing trains; give --image-share above 0");
  return model::Gate::modality;
}

// index: of the micro-batch; all have the ids of a file.
at::Tensor load_ids(const StepOptions& o, int64_t vocab, int64_t index) {
  if (o.ids.empty()) return random_ids({o.batch, o.seq}, vocab, uint64_t(index));
  const io::SafetensorsFile file(o.ids);
  const at::Tensor ids = file.tensor("input_ids");
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong, o.ids,
                 ": input_ids must be int64 [batch, seq], got ", ids.sizes().vec());
  MOEGRAFT_CHECK(ids.size(0) >= 1 && ids.size(1) >= 2, o.ids,
                 ": input_ids must hold at least 1 sequence of 2 tokens, got ", ids.sizes().vec());
  return ids.clone();
}

// Where sequences end: rows of equal length, or lengths drawn from [S/4, S] until all tokens are used.
std::vector<int64_t> sequence_ends(const StepOptions& o, int64_t B, int64_t S) {
  std::vector<int64_t> ends{0};
  Rng rng(0, "bench.lengths");
  const int64_t shortest = std::max<int64_t>(2, S / 4);
  while (ends.back() < B * S) {
    int64_t length = o.lengths == "fixed" ? S : shortest + int64_t(rng.below(uint64_t(S - shortest + 1)));
    if (B * S - ends.back() - length < 2)
      length = B * S - ends.back();  // no rest of one token, which has nothing to predict
    ends.push_back(ends.back() + length);
  }
  return ends;
}

// The sequences i with i % size == rank.
model::PackedBatch share_of(const model::PackedBatch& all, int64_t rank, int64_t size) {
  model::PackedBatch mine;
  mine.cu_seqlens = {0};
  std::vector<at::Tensor> ids, positions, labels, modality;
  for (int64_t i = rank; i < all.num_sequences(); i += size) {
    const int64_t begin = all.cu_seqlens[i], length = all.cu_seqlens[i + 1] - begin;
    mine.cu_seqlens.push_back(mine.cu_seqlens.back() + length);
    ids.push_back(all.ids_T.narrow(0, begin, length));
    positions.push_back(all.positions_T.narrow(0, begin, length));
    labels.push_back(all.labels_T.narrow(0, begin, length));
    if (all.modality_T.defined()) modality.push_back(all.modality_T.narrow(0, begin, length));
  }
  mine.ids_T = at::cat(ids), mine.positions_T = at::cat(positions), mine.labels_T = at::cat(labels);
  if (!modality.empty()) mine.modality_T = at::cat(modality);
  return mine;
}

// One micro-batch of all processes, and what is this one's.
struct StepBatch {
  model::PackedBatch mine;
  int64_t tokens = 0, sequences = 0, labels = 0, images = 0;
};

// Each sequence: text, then a picture's begin and codes as its last tokens. With the gate closed the first token is a
// new row, so that gradients still flow through every layer and position: the frozen base with activation gradients
// alone. o.batch and o.seq become those of the ids.
StepBatch make_batch(StepOptions& o, model::Gate gate, const graft::GraftedModel& m, const distributed::World& world,
                     int64_t index) {
  const at::Tensor ids_BS = load_ids(o, m.decoder->spec().vocab_size, index);
  const int64_t B = o.batch = ids_BS.size(0), S = o.seq = ids_BS.size(1), T = B * S;
  model::PackedBatch batch;
  batch.ids_T = ids_BS.reshape({-1}).contiguous();
  batch.cu_seqlens = sequence_ends(o, B, S);
  MOEGRAFT_CHECK_USAGE(batch.num_sequences() >= world.size(), "--batch is of all processes together: ", world.size(),
                       " of them need as many sequences, got ", batch.num_sequences());
  batch.positions_T = at::empty({T}, at::kLong);
  batch.labels_T = at::empty({T}, at::kLong);
  at::Tensor modality = at::zeros({T}, at::kLong);
  int64_t *ids = batch.ids_T.data_ptr<int64_t>(), *positions = batch.positions_T.data_ptr<int64_t>(),
          *labels = batch.labels_T.data_ptr<int64_t>(), *mod = modality.data_ptr<int64_t>();
  Rng rng(0, "bench.codes", uint64_t(index));
  const auto make_image = [&](int64_t t, bool begin) {
    const model::ModalityTokens& tokens = m.vocabulary.modalities.front();
    ids[t] = begin ? tokens.begin_id() : tokens.code_id(int64_t(rng.below(uint64_t(tokens.num_codes))));
    mod[t] = tokens.modality;
  };
  StepBatch out;
  out.tokens = T, out.sequences = batch.num_sequences();
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    const int64_t image =
        o.image_share > 0 ? std::max<int64_t>(1, std::llround(o.image_share * double(end - begin))) : 0;
    for (int64_t t = end - image; t < end; ++t) make_image(t, t == end - image);
    if (gate == model::Gate::none && mod[begin] == 0) make_image(begin, true);
    for (int64_t t = begin; t < end; ++t) {
      positions[t] = t - begin;
      const bool labelled = t + 1 < end && (o.labels == "all" || mod[t + 1] != 0);
      labels[t] = labelled ? ids[t + 1] : model::kNoLabel;
      out.labels += labelled;
      out.images += mod[t] != 0;
    }
  }
  if (!m.vocabulary.modalities.empty()) batch.modality_T = modality;
  if (world.size() > 1) batch = share_of(batch, world.rank(), world.size());
  batch.facts = std::make_shared<model::BatchFacts>(
      model::describe_batch(batch, m.decoder->id_bounds()));  // in training the data worker's
  out.mine = model::to_device(batch, m.device());
  return out;
}

parallel::ParallelConfig parallel_config(const StepOptions& o) {
  parallel::ParallelConfig config;
  config.expert = o.expert_parallel;
  config.shard_base = o.shard_base;
  config.shard_optimizer = o.shard_optimizer;
  config.bucket_mib = o.bucket_mib;
  return config;
}

train::AdamW make_optimizer(model::ParameterRegistry& registry, const StepOptions& o, const std::vector<bool>& owned) {
  return {registry, every_group(registry, {1e-4, 0.01}),
          train::AdamWOptions{0.9, 0.999, 1e-8, o.optimizer == "adamw_8bit"}, owned};
}

std::vector<std::string> modality_names(const graft::GraftedModel& m) {
  std::vector<std::string> names{"text"};
  for (const auto& modality : m.vocabulary.modalities) names.push_back(modality.name);
  return names;
}

// Of all layers: means of the measures of load, and the largest imbalance.
Json describe_routing(const routing::RoutingReport& report) {
  Json out;
  for (size_t i = 0; i < report.modality_names.size(); ++i) {
    double entropy = 0, worst = 0;
    int64_t layers = 0, dead = 0;
    for (const auto& layer : report.layers) {
      const routing::ModalityLoad& load = layer.modalities[i];
      if (load.tokens == 0) continue;
      ++layers, entropy += load.entropy, dead += load.dead, worst = std::max(worst, load.imbalance);
    }
    if (layers > 0)
      out[report.modality_names[i]] = {{"load_entropy", entropy / double(layers)},
                                       {"worst_imbalance", worst},
                                       {"idle_experts_per_layer", double(dead) / double(layers)}};
  }
  return out;
}

// One process's part of a step, and what it handed to the others in it.
class Stepper {
 public:
  Stepper(graft::GraftedModel& m, const distributed::Mesh& mesh, const StepOptions& o)
      : m_(m),
        clip_(o.clip),
        distributed_(parallel_config(o), mesh, *m.registry),
        optimizer_(make_optimizer(*m.registry, o, distributed_.owned())) {}

  // The micro-batches' mean loss.
  at::Tensor run(
      const std::vector<StepBatch>& batches, const model::ForwardOptions& forward,
      const std::function<void(const char*)>& phase = [](const char*) {}) {
    at::Tensor sum;
    distributed_.begin_step();
    for (size_t i = 0; i < batches.size(); ++i) {
      phase("forward");
      const auto result = m_.decoder->forward(batches[i].mine, forward);
      phase("loss");
      const auto loss =
          model::cross_entropy_loss(*m_.decoder, result, batches[i].mine,
                                    double(std::max<int64_t>(batches[i].labels, 1)) * double(batches.size()));
      phase("backward");
      if (i + 1 == batches.size()) distributed_.last_backward();
      if (loss.loss.requires_grad()) loss.loss.backward();
      sum = sum.defined() ? sum + loss.loss.detach() : loss.loss.detach();
    }
    distributed_.finish_backward();
    phase("optimizer");
    optimizer_.step(1.0, clip_ > 0 ? train::clip_factor(distributed_.grad_norm(), clip_) : 1.0);
    distributed_.share_updates();
    return sum;
  }

  // This process's part of a checkpoint.
  checkpoint::Parts parameters() const {
    return distributed_.parts_to_write(checkpoint::parameter_parts(*m_.registry));
  }
  checkpoint::Parts moments() const { return distributed_.parts_to_write(optimizer_.state_parts()); }

  std::map<std::string, distributed::Traffic> take_traffic() { return distributed_.take_traffic(m_.sharded.get()); }

 private:
  graft::GraftedModel& m_;
  double clip_;
  train::DistributedStep distributed_;
  train::AdamW optimizer_;
};

int64_t trained_parameters(const model::ParameterRegistry& registry) {
  int64_t sum = 0;
  for (const auto& p : registry.all())
    sum += p.total_rows > 0 ? p.tensor.numel() / p.tensor.size(0) * p.total_rows : p.tensor.numel();
  return sum;
}

// What the device ran in a step of `best` seconds, and for how long it ran nothing. Recording may lengthen a step, its
// kernels hardly.
Json record_kernels(const std::function<void()>& step, double best, at::Device device) {
  if (!device.is_cuda())
    return {{"absent", "a CPU runs no kernels beside its host's work: --profile shows its operations"}};
  KernelRecord record(device);
  step();
  synchronize(device);
  Json out = record.finish();
  out["idle_share"] = std::max(0.0, 1 - out["busy_s"].get<double>() / best);
  return out;
}

void print_kernels(const Json& kernels) {
  if (kernels.contains("absent")) {
    std::printf("share of time without kernels: none here, %s\n", kernels["absent"].get<std::string>().c_str());
    return;
  }
  std::printf("\n%lld kernels, %.4f s of the best step: %.1f %% of it without any\n",
              static_cast<long long>(kernels["launches"].get<int64_t>()), kernels["busy_s"].get<double>(),
              100 * kernels["idle_share"].get<double>());
  std::vector<std::vector<std::string>> rows;
  for (const auto& k : kernels["kernels"]) {
    if (rows.size() == 30) break;
    rows.push_back({k["name"].get<std::string>().substr(0, 100), std::to_string(k["calls"].get<int64_t>()),
                    fixed(1e3 * k["s"].get<double>(), 2)});
  }
  print_table({"kernel", "calls", "ms"}, rows);
}

void print(const Json& j) {
  const double best = j["best_step_s"].get<double>();
  if (j["card"].is_object()) std::printf("%s, ", j["card"]["name"].get<std::string>().c_str());
  std::printf("%.0f tokens/s, best step %.4f s (median %.4f s), peak %.0f MiB\n", j["tokens_per_s"].get<double>(), best,
              j["median_step_s"].get<double>(), j["peak_mib"].get<double>());
  std::printf("%.1f MFLOP per token, %.1f GF/s of %.1f GF/s that a large product reaches here: %.0f %%\n",
              j["flops_per_token"].get<double>() / 1e6, j["model_gflops_per_s"].get<double>(),
              j["matmul_gflops"].get<double>(), 100 * j["share_of_limit"].get<double>());
  if (j["processes"].get<int64_t>() > 1) {
    std::printf(
        "%lld processes (data %lld, experts over %lld%s%s): waiting for each other %.0f %% of the time, %.2f MiB "
        "handed over per step; peaks",
        static_cast<long long>(j["processes"].get<int64_t>()),
        static_cast<long long>(j["data_parallel"].get<int64_t>()),
        static_cast<long long>(j["expert_parallel"].get<int64_t>()),
        j["shard_base"].get<bool>() ? ", base sharded" : "",
        j["shard_optimizer"].get<bool>() ? ", optimizer sharded" : "", 100 * j["wait_share"].get<double>(),
        j["bytes_per_step"].get<double>() / (1 << 20));
    for (const auto& peak : j["peak_mib_by_rank"]) std::printf(" %.0f", peak.get<double>());
    std::printf(" MiB\n");
  }
  std::printf("loss");
  for (const auto& loss : j["loss"]) std::printf(" %.6f", loss.get<double>());
  std::printf("\n");
  std::printf("CPU path %s: float32 by %s, bfloat16 by %s\n", j["cpu"]["path"].get<std::string>().c_str(),
              j["cpu"]["float32"].get<std::string>().c_str(), j["cpu"]["bfloat16"].get<std::string>().c_str());
  if (j.contains("kernels")) print_kernels(j["kernels"]);
  if (j.contains("profile")) {
    std::printf("\none more step, with every operation on the clock: %.4f s\n", j["profile"]["total_s"].get<double>());
    OpProfile::print(j["profile"], 25);
  }
}

// How the processes' time went, from each one's {waiting, bytes, peak MiB} and the steps' length.
Json describe_processes(const distributed::Mesh& mesh, const StepOptions& o, const std::vector<double>& times,
                        const std::vector<std::vector<double>>& ranks,
                        const std::map<std::string, distributed::Traffic>& traffic, double steps) {
  double length = 0, waiting = 0, bytes = 0;
  for (const double t : times) length += t / double(times.size());
  std::vector<double> busy, by_rank, peaks;
  for (const auto& rank : ranks) {
    busy.push_back(length - rank[0] / steps);
    waiting += rank[0] / steps / double(ranks.size());
    by_rank.push_back(rank[1] / steps);
    bytes += rank[1] / steps;
    peaks.push_back(rank[2]);
  }
  Json out{{"processes", mesh.world->size()},
           {"nodes", (mesh.world->size() + mesh.world->environment().local_world_size - 1) /
                         mesh.world->environment().local_world_size},
           {"expert_parallel", mesh.expert_size()},
           {"data_parallel", mesh.data_size()},
           {"shard_base", o.shard_base},
           {"shard_optimizer", o.shard_optimizer},
           {"bucket_mib", o.bucket_mib},
           {"busy_share", 1 - waiting / length},
           {"wait_share", waiting / length},
           {"busy_seconds_by_rank", busy},
           {"bytes_per_step", bytes},
           {"bytes_per_step_by_rank", by_rank},
           {"peak_mib_by_rank", peaks}};
  for (const auto& [name, t] : traffic)
    out["traffic_of_rank_0"][name] = {{"calls", double(t.calls) / steps},
                                      {"bytes", double(t.bytes) / steps},
                                      {"wait_seconds", t.wait_seconds / steps}};
  return out;
}

// What saving takes from training, in the background or not: the stall, how long the writing took, and the steps beside
// it. Of the slowest process.
Json measure_saves(const StepOptions& o, const std::shared_ptr<distributed::World>& world, Stepper& stepper,
                   const std::vector<StepBatch>& batches, const model::ForwardOptions& forward, double step_s) {
  constexpr int64_t kEvery = 100;  // checkpoint.every's default
  Json out;
  for (const bool async : {false, true}) {
    checkpoint::CheckpointConfig config;
    config.async = async, config.keep = 1;
    const std::string name = async ? "async" : "at-once";
    checkpoint::Peers peers;  // two writers, one after the other: each with keys of its own
    if (world->size() > 1) {
      peers = checkpoint::peers_of(world);
      peers.post = [world, name](const std::string& key, const std::string& value) {
        world->post(name + " " + key, value);
      };
      peers.look = [world, name](const std::string& key) { return world->look(name + " " + key); };
    }
    checkpoint::CheckpointWriter writer(std::filesystem::path(o.save) / name, config, true, peers);
    std::vector<double> stalls, writes, beside;
    for (int64_t i = 0; i < 3; ++i) {
      world->all().barrier("bench");
      writer.save(i + 1, stepper.parameters(), stepper.moments(), "{}");
      double stall = writer.last_stall_seconds();
      const auto start = Clock::now();
      stepper.run(batches, forward);
      const double step = seconds_since(start);
      writer.wait();
      double write = writer.last_write_seconds(), slowest = step;
      for (const auto& rank : world->all().all_gather_numbers({stall, write, step}, "figures"))
        stall = std::max(stall, rank[0]), write = std::max(write, rank[1]), slowest = std::max(slowest, rank[2]);
      stalls.push_back(stall), writes.push_back(write), beside.push_back(slowest);
    }
    const double steady = median({stalls.begin() + 1, stalls.end()});  // the first one makes the buffers
    out[async ? "async" : "at_once"] = {{"first_stall_s", stalls[0]},
                                        {"stall_s", steady},
                                        {"write_s", median(writes)},
                                        {"step_beside_s", median(beside)},
                                        {"stall_share_every_100", steady / (double(kEvery) * step_s + steady)}};
    out["bytes_of_rank_0"] = writer.last_bytes();
  }
  return out;
}

// Of all processes at the same time.
double limit_of_all(distributed::World& world, at::ScalarType dtype, at::Device device, int64_t size) {
  double sum = 0;
  world.all().barrier("bench");
  for (const auto& one : world.all().all_gather_numbers({matmul_gflops(dtype, device, size)}, "figures")) sum += one[0];
  return sum;
}

void measure(const StepOptions& given, const std::shared_ptr<distributed::World>& world) {
  StepOptions o = given;
  const model::Gate gate = choose_gate(o);
  const distributed::Mesh mesh = distributed::make_mesh(world, o.expert_parallel);
  model::ForwardOptions forward;
  forward.gate = gate;
  forward.recompute_layers = o.recompute;
  forward.frozen_prefix = !o.whole_backward;
  forward.lockstep = parallel::lockstep(mesh, o.shard_base);
  o.model.codes = o.image_share > 0 || gate == model::Gate::none ? o.codes : 0;
  if (gate == model::Gate::none) o.model.rank = 0;
  graft::GraftedModel m = open_model(o.model, &mesh, o.shard_base);
  const at::Device device = m.device();
  const at::ScalarType dtype = m.decoder->dtype();
  std::vector<StepBatch> batches;
  for (int64_t i = 0; i < o.accumulate; ++i) batches.push_back(make_batch(o, gate, m, *world, i));
  const StepBatch& batch = batches.front();  // the others are of its shape
  routing::RoutingStats routing(m.decoder->spec().num_layers, std::max<int64_t>(m.decoder->spec().num_experts, 1),
                                modality_names(m), device);
  if (o.routing) forward.routing = &routing;
  Stepper stepper(m, mesh, o);
  double limit = limit_of_all(*world, dtype, device, o.matmul);

  std::vector<double> times, losses;
  std::map<std::string, distributed::Traffic> traffic;  // of all steps but the first, where there are more
  double waiting = 0, bytes = 0;
  for (int64_t i = 0; i < o.steps; ++i) {
    synchronize(device);
    world->all().barrier("bench");
    stepper.take_traffic();
    const auto start = Clock::now();
    const at::Tensor loss = stepper.run(batches, forward);
    synchronize(device);
    const double mine = seconds_since(start);
    const auto step_traffic = stepper.take_traffic();
    double slowest = 0, sum = 0;
    for (const auto& rank : world->all().all_gather_numbers({mine, loss.item<double>()}, "figures"))
      slowest = std::max(slowest, rank[0]), sum += rank[1];
    times.push_back(slowest);
    losses.push_back(sum);
    if (world->rank() == 0)
      std::fprintf(stderr, "step %lld of %lld: %.4f s, loss %.6f\n", static_cast<long long>(i + 1),
                   static_cast<long long>(o.steps), slowest, sum);
    if (i == 0 && o.steps > 1) continue;
    for (const auto& [name, t] : step_traffic) {
      traffic[name] += t;
      waiting += t.wait_seconds, bytes += double(t.bytes);
    }
    waiting += slowest - mine;
  }
  const PeakMemory peak = peak_memory(device);
  const double peak_mib = device.is_cuda() ? peak.device_mib : peak.rusage_mib;
  Json profile;
  if (o.profile) {
    OpProfile ops(device);
    stepper.run(batches, forward, [&](const char* name) { ops.phase(name); });
    profile = ops.finish();
  }
  Json kernels;
  if (o.kernels)
    kernels =
        record_kernels([&] { stepper.run(batches, forward); }, *std::min_element(times.begin(), times.end()), device);
  const Json place = describe_place(device);  // the clocks of a card that has just worked
  limit = std::max(limit, limit_of_all(*world, dtype, device, o.matmul));
  Json saves;
  if (!o.save.empty()) saves = measure_saves(o, world, stepper, batches, forward, median(times));
  const auto ranks = world->all().all_gather_numbers({waiting, bytes, peak_mib}, "figures");

  std::vector<model::Site> sites;
  for (const auto& name : o.model.sites) sites.push_back(adapters::parse_site(name));
  const planning::StepWork mine = planning::count_work(m, batch.mine, gate, o.model.rank, sites, o.accumulate);
  planning::StepWork work;
  for (const auto& w : world->all().all_gather_numbers(
           {mine.forward, mine.activation_gradient, mine.lora, mine.attention_scores, mine.memory_bytes}, "figures")) {
    work.forward += w[0], work.activation_gradient += w[1], work.lora += w[2], work.attention_scores += w[3],
        work.memory_bytes += w[4];
  }
  if (world->rank() != 0) return;
  const double best = *std::min_element(times.begin(), times.end());
  const int64_t T = batch.tokens * o.accumulate;
  Json out{{"tool", "moegraft"},
           {"bench", "step"},
           {"tokens_per_s", double(T) / best},
           {"step_s", times},
           {"best_step_s", best},
           {"median_step_s", median(times)},
           {"loss", losses},
           {"peak_mib", peak_mib},
           {"reserved_mib", device.is_cuda() ? Json(peak.reserved_mib) : Json()},
           {"card_used_mib", device.is_cuda() ? Json(peak.card_mib) : Json()},
           {"host_peak_mib", peak.rusage_mib},
           {"vm_hwm_mib", peak.high_water_mib},
           {"matmul_gflops", limit},
           {"flops_per_token", work.total() / double(T)},
           {"flops",
            {{"forward", work.forward},
             {"activation_gradient", work.activation_gradient},
             {"lora", work.lora},
             {"attention_scores_not_counted", work.attention_scores}}},
           {"memory_bytes", work.memory_bytes},
           {"model_gflops_per_s", work.total() / best / 1e9},
           {"share_of_limit", work.total() / best / 1e9 / limit},
           {"dtype", o.model.dtype},
           {"tokens", T},
           {"sequences", batch.sequences * o.accumulate},
           {"batch", o.batch},
           {"seq", o.seq},
           {"accumulate", o.accumulate},
           {"optimizer", o.optimizer},
           {"clip", o.clip},
           {"layers", m.decoder->spec().num_layers},
           {"random", !o.model.random.empty()},
           {"lengths", o.lengths},
           {"gate", gate == model::Gate::all    ? "all"
                    : gate == model::Gate::none ? "none"
                                                : "modality"},
           {"image_share", double(batch.images) / double(T)},
           {"labels", o.labels},
           {"rank", o.model.rank},
           {"sites", o.model.sites},
           {"new_rows", m.vocabulary.modalities.empty() ? 0 : m.vocabulary.modalities.front().num_rows()},
           {"quantize", o.model.quantize},
           {"recompute_layers", o.recompute},
           {"frozen_prefix", forward.frozen_prefix},
           {"trained_parameters", trained_parameters(*m.registry)},
           {"active_parameters", m.decoder->spec().num_active_parameters()},
           {"cores", usable_cores()}};
  out.update(place);
  const double counted = o.steps > 1 ? double(o.steps - 1) : 1;
  out.update(describe_processes(mesh, o, {times.begin() + (o.steps > 1), times.end()}, ranks, traffic, counted));
  if (!saves.is_null()) out["checkpoint"] = std::move(saves);
  if (!profile.is_null()) out["profile"] = std::move(profile);
  if (!kernels.is_null()) out["kernels"] = std::move(kernels);
  if (o.routing) out["routing"] = describe_routing(routing.read());
  if (o.json)
    std::cout << out.dump() << '\n';
  else
    print(out);
}

void run(const StepOptions& o) {
  const model::Gate gate = choose_gate(o);
  MOEGRAFT_CHECK_USAGE(o.labels == "all" || o.image_share > 0,
                       "--labels image: there are no image tokens; give --image-share above 0");
  set_threads(o.threads);
  with_world(o.model.device,
             moegraft::detail::concat("step ", o.model.model, o.model.random, " ", o.model.layers, " ", o.accumulate,
                                      o.optimizer, o.clip, o.routing, o.kernels, " ", o.model.dtype, " rank ",
                                      o.model.rank, " ", o.ids, " ", o.lengths, " ", int(gate), " ", o.labels, " ",
                                      o.batch, "x", o.seq, " ", o.steps, " ", o.codes, " ", o.recompute, " ", o.matmul,
                                      " ", o.image_share, " ", o.expert_parallel, o.shard_base, o.shard_optimizer,
                                      o.whole_backward, o.profile, " ", o.bucket_mib, " ", o.save),
             [&](const auto& world) { measure(o, world); });
}

}  // namespace

std::function<void()> add_step_options(CLI::App& cmd) {
  auto o = std::make_shared<StepOptions>();
  add_model_options(cmd, o->model);
  add_random_options(cmd, o->model);
  cmd.add_option("--batch", o->batch, "Sequences of a micro-batch, of all processes together")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd.add_option("--seq", o->seq, "Tokens of a sequence")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  cmd.add_option("--lengths", o->lengths, "fixed, or ragged: the same tokens packed as sequences of seq/4 to seq")
      ->check(CLI::IsMember({"fixed", "ragged"}))
      ->capture_default_str();
  cmd.add_option("--image-share", o->image_share,
                 "Share of each sequence that is a made-up modality's tokens, at its end")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  cmd.add_option("--codes", o->codes, "Codebook of that modality")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  cmd.add_option("--gate", o->gate,
                 "Rows that LoRA acts on: all, modality, none (default: all, or modality with image tokens)");
  cmd.add_option("--labels", o->labels, "Tokens to predict: all, or image")
      ->check(CLI::IsMember({"all", "image"}))
      ->capture_default_str();
  cmd.add_option("--accumulate", o->accumulate, "Micro-batches of a step, each of its own ids")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  cmd.add_option("--optimizer", o->optimizer, "adamw, or adamw_8bit: moments in two bytes per parameter")
      ->check(CLI::IsMember({"adamw", "adamw_8bit"}))
      ->capture_default_str();
  cmd.add_option("--clip", o->clip, "As train.clip: the gradients' norm is taken and held to this; 0: neither")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  cmd.add_flag("--routing", o->routing, "Keep routing statistics, as training does");
  cmd.add_option("--recompute", o->recompute,
                 "Layers, from the first, that run again in the backward pass instead of keeping their activations")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd.add_option("--expert-parallel", o->expert_parallel,
                 "Processes that the experts are spread over (under a launcher; as parallel.expert)")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  cmd.add_flag("--shard-base", o->shard_base, "As parallel.shard_base");
  cmd.add_flag("--shard-optimizer", o->shard_optimizer, "As parallel.shard_optimizer");
  cmd.add_option("--bucket-mib", o->bucket_mib, "As parallel.bucket_mib")
      ->check(CLI::Range(0.01, 1e5))
      ->capture_default_str();
  cmd.add_option("--save", o->save, "Folder to write checkpoints to, in the background and at once: the stall of each");
  cmd.add_flag("--whole-backward", o->whole_backward,
               "Record gradients for the text before the first image token too, which needs none");
  cmd.add_option("--steps", o->steps, "Steps to time; the best counts")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  cmd.add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd.add_option("--ids", o->ids, "safetensors with input_ids int64 [batch, seq] instead of random ids");
  cmd.add_option("--matmul", o->matmul,
                 "Rows and columns of the product that stands for the machine's limit; 0: 2048, or 8192 on a GPU")
      ->check(CLI::Range(0, 1 << 16));
  cmd.add_flag("--profile", o->profile, "One more step with every operation on the clock");
  cmd.add_flag("--kernels", o->kernels,
               "One more step with every kernel recorded: time by kernel, and the share of time without any (GPU)");
  cmd.add_flag("--json", o->json, "One JSON object on stdout");
  cmd.footer(
      "Example: moegraft bench step models/base --batch 4 --seq 512 --dtype bfloat16 --rank 16 --steps 5 --profile\n"
      "         moegraft bench step --random config.json --device cuda --batch 2 --seq 4096 --optimizer adamw_8bit "
      "--accumulate 4 --routing --clip 1 --kernels\n"
      "         moegraft launch --nproc 4 -- bench step models/base --batch 16 --expert-parallel 2 --json");
  return [o] { run(*o); };
}

}  // namespace moegraft::tools::bench
