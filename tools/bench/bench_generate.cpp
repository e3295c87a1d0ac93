// moegraft bench generate: reading a batch of prompts (prefill), writing text with cached keys and values (decode), and
// drawing pictures' codes in one batch. Random ids, greedy text, so that another program can be held against it.
#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/generate/images.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/fixed_step.h"

namespace moegraft::tools::bench {
namespace {

struct GenerateOptions {
  ModelOptions model;
  std::string ids;
  int64_t batch = 4, prompt = 128, tokens = 32, pictures = 16, codes = 1024, rounds = 3, threads = 0;
  bool json = false, cuda_graphs = false, profile = false;
};

// Stands for a tokenizer: any text reads as the given ids.
class FixedPrompt : public tokenizer::Tokenizer {
 public:
  FixedPrompt(std::vector<int64_t> ids, int64_t size) : ids_(std::move(ids)), size_(size) {}
  std::vector<int64_t> encode(std::string_view, bool) const override { return ids_; }
  std::string decode(const std::vector<int64_t>&, bool) const override { return {}; }
  int64_t size() const override { return size_; }
  int64_t id_of(std::string_view) const override { return -1; }
  std::string piece_of(int64_t) const override { return {}; }
  int64_t bos_id() const override { return -1; }
  int64_t eos_id() const override { return -1; }

 private:
  std::vector<int64_t> ids_;
  int64_t size_;
};

at::Tensor load_prompts(const GenerateOptions& o, int64_t vocab) {
  if (o.ids.empty()) return random_ids({o.batch, o.prompt}, vocab);
  const at::Tensor ids = io::SafetensorsFile(o.ids).tensor("input_ids");
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.numel() > 0 && ids.scalar_type() == at::kLong, o.ids,
                 ": input_ids must be int64 [batch, prompt], got ", ids.sizes().vec());
  return ids.clone();
}

struct TextTimes {
  double prefill_s = 0, decode_s = 0;
  at::Tensor ids_BN;
};

TextTimes write_text(const graft::GraftedModel& m, const at::Tensor& prompts_BS, int64_t count, bool cuda_graphs,
                     OpProfile* ops = nullptr) {
  const at::Device device = m.device();
  const int64_t B = prompts_BS.size(0), S = prompts_BS.size(1);
  model::KvCache cache(m.decoder->spec(), B, S + count, m.decoder->dtype(), device);
  model::ForwardOptions options;
  options.cache = &cache;
  model::PackedBatch batch = model::pack_rows(prompts_BS);
  synchronize(device);
  if (ops) ops->phase("prefill");
  auto start = Clock::now();
  const at::Tensor hidden_BD = m.decoder->forward(batch, options).hidden_TD.view({B, S, -1}).select(1, S - 1);
  const auto likeliest = [&](const at::Tensor& hidden_BD) { return m.decoder->text_logits(hidden_BD).argmax(-1); };
  std::vector<at::Tensor> ids{likeliest(hidden_BD.contiguous())};
  synchronize(device);
  TextTimes times{seconds_since(start), 0, {}};
  std::optional<model::FixedStep> recorded;
  if (cuda_graphs) recorded.emplace(*m.decoder, cache, B, 0, likeliest, true);
  if (ops) ops->phase("decode");
  start = Clock::now();
  while (int64_t(ids.size()) < count) {
    if (recorded) {
      const at::Tensor last = ids.back().to(at::kCPU);
      ids.push_back((*recorded)({last.const_data_ptr<int64_t>(), last.const_data_ptr<int64_t>() + B}).clone());
      continue;
    }
    batch = model::pack_rows(ids.back().unsqueeze(1));
    batch.positions_T = batch.positions_T + (S + int64_t(ids.size()) - 1);
    batch.facts = nullptr;
    ids.push_back(likeliest(m.decoder->forward(batch, options).hidden_TD));
  }
  synchronize(device);
  times.decode_s = seconds_since(start);
  times.ids_BN = at::stack(ids, 1).to(at::kCPU);
  return times;
}

// Seconds from the first code of every picture to the last: the prompt is read once for all of them before that.
double draw_pictures(const graft::GraftedModel& m, int64_t pictures, uint64_t seed, bool cuda_graphs,
                     OpProfile* ops = nullptr) {
  generate::ImageOptions options;
  if (cuda_graphs) options.steps = generate::DecodeSteps::recorded;
  options.n = options.max_batch = pictures;
  options.max_cache_bytes = int64_t{1} << 50;
  options.pixels = false;
  options.seed = seed;
  Clock::time_point first;
  options.on_progress = [&](int64_t done, int64_t) {
    if (done != pictures) return;
    if (ops) ops->phase("image codes");
    first = Clock::now();
  };
  if (ops) ops->phase("image prompt");
  generate::generate_images(m, std::vector<std::string>{"prompt"}, options);
  return seconds_since(first);
}

void run(const GenerateOptions& given) {
  GenerateOptions o = given;
  set_threads(o.threads);
  o.model.codes = o.codes;
  o.model.item_length = o.tokens;
  graft::GraftedModel m = open_model(o.model);
  const at::NoGradGuard no_grad;
  const int64_t vocab = m.decoder->spec().vocab_size, room = m.decoder->spec().max_positions;
  const at::Tensor prompts = load_prompts(o, vocab);
  o.batch = prompts.size(0), o.prompt = prompts.size(1);
  // A picture's sequence also holds its begin token.
  MOEGRAFT_CHECK_USAGE(room <= 0 || o.prompt + o.tokens + 2 <= room, "bench generate: ", o.prompt,
                       " prompt tokens and ", o.tokens, " more do not fit the model's ", room, " positions");
  m.vocabulary.bos_id = -1;  // the prompt is exactly these ids
  m.tokenizer = std::make_shared<FixedPrompt>(
      std::vector<int64_t>(prompts.const_data_ptr<int64_t>(), prompts.const_data_ptr<int64_t>() + o.prompt), vocab);
  std::vector<double> prefill, decode, image;
  at::Tensor ids_BN;
  for (int64_t i = 0; i < o.rounds; ++i) {
    const TextTimes t = write_text(m, prompts.to(m.device()), o.tokens, o.cuda_graphs);
    prefill.push_back(t.prefill_s);
    decode.push_back(t.decode_s);
    ids_BN = t.ids_BN;
  }
  const PeakMemory peak = peak_memory(m.device());
  for (int64_t i = 0; i < o.rounds && o.pictures > 0; ++i)
    image.push_back(draw_pictures(m, o.pictures, uint64_t(i), o.cuda_graphs));
  const auto best = [](const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); };
  std::vector<std::vector<int64_t>> ids;
  for (int64_t b = 0; b < o.batch; ++b)
    ids.emplace_back(ids_BN[b].const_data_ptr<int64_t>(), ids_BN[b].const_data_ptr<int64_t>() + o.tokens);
  Json out{{"tool", "moegraft"},
           {"prefill_tokens_per_s", double(o.batch * o.prompt) / best(prefill)},
           {"decode_tokens_per_s", double(o.batch * (o.tokens - 1)) / best(decode)},
           {"decode_step_ms", 1e3 * best(decode) / double(o.tokens - 1)},
           {"prefill_s", prefill},
           {"decode_s", decode},
           {"ids", ids},
           {"peak_mib", m.device().is_cuda() ? peak.device_mib : peak.rusage_mib},
           {"vm_hwm_mib", peak.high_water_mib},
           {"batch", o.batch},
           {"prompt", o.prompt},
           {"new_tokens", o.tokens},
           {"dtype", o.model.dtype},
           {"rank", o.model.rank},
           {"layers", m.decoder->spec().num_layers},
           {"cuda_graphs", o.cuda_graphs}};
  out.update(describe_place(m.device()));
  if (!image.empty()) {
    out["image_tokens_per_s"] = double(o.pictures * (o.tokens - 1)) / best(image);
    out["image_decode_s"] = image;
    out["pictures"] = o.pictures;
    out["codes"] = o.codes;
  }
  if (o.profile) {
    OpProfile ops(m.device());
    write_text(m, prompts.to(m.device()), o.tokens, o.cuda_graphs, &ops);
    if (o.pictures > 0) draw_pictures(m, o.pictures, 0, o.cuda_graphs, &ops);
    out["profile"] = ops.finish();
  }
  if (o.json) {
    std::cout << out.dump() << '\n';
    return;
  }
  std::printf("prefill %lld x %lld tokens: %.0f tokens/s\ndecode %lld sequences: %.0f tokens/s, %.2f ms a step\n",
              (long long)o.batch, (long long)o.prompt, out["prefill_tokens_per_s"].get<double>(), (long long)o.batch,
              out["decode_tokens_per_s"].get<double>(), out["decode_step_ms"].get<double>());
  if (!image.empty())
    std::printf("image codes, %lld pictures with LoRA of rank %lld: %.0f tokens/s\n", (long long)o.pictures,
                (long long)o.model.rank, out["image_tokens_per_s"].get<double>());
  std::printf("peak %.0f MiB\n", out["peak_mib"].get<double>());
  if (out.contains("profile")) {
    std::printf("\nonce more, with every operation on the clock: %.4f s\n", out["profile"]["total_s"].get<double>());
    OpProfile::print(out["profile"], 40);
  }
}

}  // namespace

void add_generate_command(CLI::App& bench) {
  auto o = std::make_shared<GenerateOptions>();
  CLI::App* cmd = bench.add_subcommand("generate", "Prefill, text decode and batched image codes");
  add_model_options(*cmd, o->model);
  add_random_options(*cmd, o->model);
  cmd->add_option("--batch", o->batch, "Sequences of text")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  cmd->add_option("--prompt", o->prompt, "Tokens of a prompt")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  cmd->add_option("--tokens", o->tokens, "Tokens to write, and codes of a picture")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--pictures", o->pictures, "Pictures drawn together, LoRA acting on their codes; 0: none")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
  cmd->add_option("--codes", o->codes, "Codebook of the made-up modality")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  cmd->add_option("--rounds", o->rounds, "Times each is run; the best counts")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  cmd->add_option("--ids", o->ids, "safetensors with input_ids int64 [batch, prompt] instead of random prompts");
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_flag("--cuda-graphs", o->cuda_graphs,
                "Replay recorded decode steps (bf16 on a Hopper GPU; not tried on a card yet)");
  cmd->add_flag("--profile", o->profile, "Once more with every operation on the clock");
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer(
      "Example: moegraft bench generate models/base --batch 4 --prompt 128 --tokens 64 --pictures 16 --dtype bfloat16");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
