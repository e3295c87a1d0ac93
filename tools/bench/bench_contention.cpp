// moegraft bench contention: what a step of each trainer costs in CPU seconds alone and beside other jobs. Threads that
// wait by spinning, or that sleep and wake at every meeting, cost more the busier the machine is; elapsed time cannot
// show it, since the cores are shared then.
#include <csignal>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libtorch.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/model/device.h"
#include "moegraft/train/codec.h"

namespace moegraft::tools::bench {
namespace {

struct ContentionOptions {
  ModelOptions model;
  std::vector<std::string> trainers{"codec", "graft", "base"};
  int64_t busy = 5, steps = 10, rounds = 3, batch = 8, seq = 128, threads = 0;
  bool json = false;
};

using Step = std::function<void()>;

// Processes that do nothing but use the cores, until the end of the scope.
class BusyLoops {
 public:
  explicit BusyLoops(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const pid_t parent = getpid(), pid = fork();
      MOEGRAFT_CHECK(pid >= 0, "bench contention: cannot start a process");
      if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (volatile uint64_t turns = 0; getppid() == parent;)
          for (int k = 0; k < 1'000'000; ++k) turns = turns + 1;
        _exit(0);
      }
      children_.push_back(pid);
    }
  }
  ~BusyLoops() {
    for (const pid_t pid : children_) kill(pid, SIGKILL);
    for (const pid_t pid : children_) waitpid(pid, nullptr, 0);
  }
  BusyLoops(const BusyLoops&) = delete;

 private:
  std::vector<pid_t> children_;
};

// Of this process, all threads, in user and system mode.
double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * double(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

// A model directory of the quickstart's shapes with random weights, where none is given.
class MadeUpModel {
 public:
  MadeUpModel() {
    char name[] = "/tmp/moegraft-bench-XXXXXX";
    MOEGRAFT_CHECK(mkdtemp(name), "cannot make a temporary folder in /tmp");
    dir_ = name;
    model::DecoderSpec s;
    s.family = "qwen3_moe";
    s.vocab_size = 2048, s.hidden_size = 192, s.num_layers = 4, s.num_heads = 6, s.num_kv_heads = 2, s.head_dim = 32;
    s.intermediate_size = s.moe_intermediate_size = 192, s.num_experts = 8, s.num_experts_per_tok = 2;
    s.router.renormalise = true, s.qk_norm = model::QkNorm::per_head, s.max_positions = 512,
    s.router_aux_loss_coef = 0.01;
    s.layers.assign(size_t(s.num_layers), {});
    model::save_base(model::init_base(s, {}), dir_, at::kFloat);
  }
  ~MadeUpModel() {
    std::error_code error;
    std::filesystem::remove_all(dir_, error);
  }
  MadeUpModel(const MadeUpModel&) = delete;
  std::string dir() const { return dir_.string(); }

 private:
  std::filesystem::path dir_;
};

Step codec_step() {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{1});
  const codec::VqConfig config;  // the quickstart's
  codec::CodecTrainConfig train;
  train.warm_share = 0;
  const auto pixels =
      at::randint(0, 256, {256, 3, config.image_size, config.image_size}, generator, at::kLong).to(at::kByte);
  const auto trainer = std::make_shared<train::CodecTrainer>(config, train, 1, pixels);
  return
      [trainer, next = int64_t{0}]() mutable { trainer->step(next++, 0.25); };  // encoder, codebook and decoder learn
}

// Rows of equal length; with a modality the second half of each is a picture.
model::PackedBatch make_batch(const ContentionOptions& o, const graft::GraftedModel& m) {
  at::Tensor ids_BS = random_ids({o.batch, o.seq}, m.decoder->spec().vocab_size), modality_BS = at::zeros_like(ids_BS);
  const bool pictures = !m.vocabulary.modalities.empty();
  if (pictures) {
    const model::ModalityTokens& tokens = m.vocabulary.modalities.front();
    const int64_t text = o.seq / 2, codes = o.seq - text;
    ids_BS.narrow(1, text, codes).copy_(random_ids({o.batch, codes}, tokens.num_codes, 1) + tokens.code_id(0));
    ids_BS.select(1, text).fill_(tokens.begin_id());
    modality_BS.narrow(1, text, codes).fill_(tokens.modality);
  }
  model::PackedBatch batch = model::pack_rows(ids_BS);
  if (pictures) batch.modality_T = modality_BS.reshape({-1});
  batch.labels_T = at::cat({ids_BS.slice(1, 1), at::full({o.batch, 1}, model::kNoLabel, at::kLong)}, 1).reshape({-1});
  batch.facts = std::make_shared<model::BatchFacts>(model::describe_batch(batch, m.decoder->id_bounds()));
  return model::to_device(batch, m.device());
}

// What a training run does in a step, on one batch.
Step decoder_step(const ContentionOptions& o, const std::shared_ptr<graft::GraftedModel>& m, bool balances) {
  const auto optimizer = std::make_shared<train::AdamW>(*m->registry, every_group(*m->registry, {1e-4, 0.01}));
  return [m, optimizer, balances, batch = make_batch(o, *m)] {
    m->registry->zero_grad();
    model::ForwardOptions forward;
    forward.aux_loss = balances;
    const auto result = m->decoder->forward(batch, forward);
    const auto ce = model::cross_entropy_loss(*m->decoder, result, batch);
    (balances ? ce.loss + result.aux_loss * m->decoder->spec().router_aux_loss_coef : ce.loss).backward();
    optimizer->step(1.0, train::clip_factor(train::global_grad_norm(*m->registry), 1.0));
  };
}

Step graft_step(const ContentionOptions& o) {
  ModelOptions model = o.model;
  model.codes = 512, model.item_length = 36;
  return decoder_step(o, std::make_shared<graft::GraftedModel>(open_model(model)), false);
}

// From scratch, in float32 as train.base_weights: full.
Step base_step(const ContentionOptions& o) {
  auto m = std::make_shared<graft::GraftedModel>();
  m->registry = std::make_unique<model::ParameterRegistry>();
  model::BaseModel base = model::init_base(model::read_spec(o.model.model), {});
  model::register_base(base, *m->registry);
  const bool balances = base.spec.router_aux_loss_coef > 0;
  m->decoder = std::make_unique<model::Decoder>(std::move(base));
  return decoder_step(o, m, balances);
}

// By turns, so that what else the machine does meets both; the least of each counts, as other jobs only add.
Json measure(const ContentionOptions& o, const Step& step) {
  for (int64_t i = 0; i < 3; ++i) step();  // layouts, kernels, memory
  struct Side {
    std::vector<double> cpu_s, step_s;
  } alone, beside;
  const auto run = [&](Side& side) {
    const double cpu = cpu_seconds();
    const auto start = Clock::now();
    for (int64_t i = 0; i < o.steps; ++i) step();
    side.step_s.push_back(seconds_since(start) / double(o.steps)),
        side.cpu_s.push_back((cpu_seconds() - cpu) / double(o.steps));
  };
  for (int64_t round = 0; round < o.rounds; ++round) {
    run(alone);
    const BusyLoops loops(o.busy);
    run(beside);
  }
  const auto best = [](const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); };
  const auto describe = [&](const Side& side) {
    return Json{{"cpu_s", best(side.cpu_s)}, {"median_cpu_s", median(side.cpu_s)}, {"step_s", best(side.step_s)}};
  };
  return {{"alone", describe(alone)},
          {"beside", describe(beside)},
          {"ratio", best(beside.cpu_s) / best(alone.cpu_s)},
          {"median_ratio", median(beside.cpu_s) / median(alone.cpu_s)}};
}

void run(const ContentionOptions& given) {
  ContentionOptions o = given;
  set_threads(o.threads);
  double load = 0;
  MOEGRAFT_CHECK(getloadavg(&load, 1) == 1, "bench contention: the load of this machine cannot be read");
  std::unique_ptr<MadeUpModel> made_up;
  const bool needs_model =
      std::any_of(o.trainers.begin(), o.trainers.end(), [](const auto& t) { return t != "codec"; });
  if (o.model.model.empty() && needs_model) made_up = std::make_unique<MadeUpModel>(), o.model.model = made_up->dir();
  Json out{{"tool", "moegraft"},      {"bench", "contention"}, {"busy", o.busy},
           {"steps", o.steps},        {"rounds", o.rounds},    {"threads", at::get_num_threads()},
           {"cores", usable_cores()}, {"load_at_start", load}, {"trainers", Json::object()}};
  std::vector<std::vector<std::string>> rows;
  for (const auto& name : o.trainers) {
    Json j = measure(o, name == "codec" ? codec_step() : name == "graft" ? graft_step(o) : base_step(o));
    const auto number = [&](const char* side, const char* what) { return fixed(j[side][what].get<double>(), 4); };
    rows.push_back({name, number("alone", "cpu_s"), number("beside", "cpu_s"), fixed(j["ratio"].get<double>(), 2),
                    number("alone", "step_s"), number("beside", "step_s")});
    out["trainers"][name] = std::move(j);
  }
  if (o.json)
    std::cout << out.dump() << '\n';
  else
    print_table({"trainer", "CPU s a step", detail::concat("beside ", o.busy), "ratio", "elapsed s",
                 detail::concat("beside ", o.busy)},
                rows);
}

}  // namespace

void add_contention_command(CLI::App& bench) {
  auto o = std::make_shared<ContentionOptions>();
  o->model.dtype = "float32";
  o->model.sites = {"gate", "up", "down", "q", "v"};
  CLI::App* cmd = bench.add_subcommand("contention",
                                       "CPU seconds of each trainer's step alone and beside busy loops: what sharing "
                                       "the machine costs beyond its share");
  add_model_options(*cmd, o->model);
  cmd->add_option(
         "--trainers", o->trainers,
         "codec: a codec's training; graft: adapters and rows on a frozen base; base: all weights, from scratch")
      ->delimiter(',')
      ->check(CLI::IsMember({"codec", "graft", "base"}))
      ->capture_default_str();
  cmd->add_option("--busy", o->busy, "Busy loops beside")->check(CLI::Range(1, 4096))->capture_default_str();
  cmd->add_option("--steps", o->steps, "Steps of a turn")->check(CLI::Range(1, 100000))->capture_default_str();
  cmd->add_option("--rounds", o->rounds, "Turns of either side; the least counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  cmd->add_option("--batch", o->batch, "Sequences of a graft's or base's step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--seq", o->seq, "Tokens of a sequence")->check(CLI::Range(4, 1 << 24))->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer(
      "Example: moegraft bench contention --busy 5\n"
      "Without MODEL: a made-up one of the quickstart's shapes. The codec is always the quickstart's.");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
