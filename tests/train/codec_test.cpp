// Codec training: what a step does, exact resume, kills, signals, what is refused.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <csignal>
#include <numbers>
#include <thread>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/rng.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"
#include "moegraft/train/codec.h"
#include "moegraft/run/signals.h"
#include "support/metrics.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using codec::CodecRunConfig;
using codec::CodecTrainConfig;
using codec::ParameterList;
using codec::VqCodec;
using codec::VqConfig;
using moegraft::testing::Process;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::training_column;

VqConfig tiny() {
  VqConfig c;
  c.image_size = 12, c.patch = 3, c.channels = {8, 16}, c.encoder_blocks = {1, 0}, c.decoder_blocks = {1, 1};
  c.mixer_blocks = 1, c.mixer_width = 24, c.codebook_size = 16, c.code_width = 4;
  return c;
}

CodecTrainConfig quick(int64_t steps) {
  CodecTrainConfig t;
  t.steps = steps, t.batch_size = 8, t.warmup = 5, t.lr = 3e-3, t.precision = "float32";
  return t;
}

// Discs of random colours on white.
at::Tensor drawings(int64_t count, int64_t size, uint64_t seed = 5) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto colour = at::randint(0, 200, {count, 3, 1, 1}, generator, at::kLong),
             centre = at::randint(3, size - 3, {count, 2, 1, 1}, generator, at::kLong);
  const auto axis = at::arange(size);
  const auto x = axis.view({1, 1, size}) - centre.select(1, 0), y = axis.view({1, size, 1}) - centre.select(1, 1);
  const auto inside = (x.square() + y.square() < 10).unsqueeze(1);
  return at::where(inside, colour, at::full({}, 255, at::kLong)).to(at::kByte);
}

ParameterList parameters_of(const VqCodec& model) {
  ParameterList all = model.encoder_parameters();
  for (const auto& p : model.decoder_parameters()) all.push_back(p);
  return all;
}

io::TensorMap map_of(const checkpoint::Parts& parts) {
  io::TensorMap map;
  for (const auto& part : parts) map[part.name] = part.tensor.clone();
  return map;
}

// Without a folder.
struct Trained {
  std::unique_ptr<VqCodec> codec;
  std::vector<double> losses;
};
Trained train_vq(const VqConfig& config, const CodecTrainConfig& train, uint64_t seed, const at::Tensor& pixels) {
  CodecTrainer trainer(config, train, seed, pixels);
  Trained out;
  for (int64_t step = 0; step < train.steps; ++step)
    out.losses.push_back(trainer.step(step, double(step) / double(train.steps)).loss);
  out.codec = trainer.finish();
  return out;
}

template <class E = UserError, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) { return e.what(); }
  return "nothing thrown";
}
#define EXPECT_SAYS(error, text, ...)                                              \
  EXPECT_NE(message_of<error>([&] { __VA_ARGS__; }).find(text), std::string::npos) \
      << message_of<error>([&] { __VA_ARGS__; })

class CodecTraining : public ::testing::Test {
 protected:
  void SetUp() override {
    threads_ = at::get_num_threads();
    at::set_num_threads(1);  // tensors this small only lose time to a second thread, minutes of it on a busy machine
  }
  void TearDown() override { at::set_num_threads(threads_); }
  // 6 steps: an autoencoder, from the third one on with codes, from the fifth one on the decoder alone.
  CodecRunConfig config(const std::string& name) const {
    CodecRunConfig c;
    c.dir = (folder_ / name).string(), c.seed = 9;
    c.codec = tiny();
    c.data.train = {{"pictures.jsonl", 1}};
    c.train = quick(6);
    c.train.warm_share = 0.3, c.train.freeze_share = 0.6, c.train.log_every = 1;
    c.checkpoint.every = 1, c.checkpoint.keep = 100;
    return c;
  }
  std::string bytes_of(const VqCodec& model) const {
    model.save(folder_ / "saved");
    return io::read_file(folder_ / "saved/model.safetensors");
  }
  TemporaryFolder folder_;
  int threads_ = 1;
};

TEST_F(CodecTraining, LowersTheLossAndRepeats) {
  const auto pixels = drawings(32, 12);
  const auto [a, first] = train_vq(tiny(), quick(160), 9, pixels);
  const auto [b, second] = train_vq(tiny(), quick(160), 9, pixels);
  ASSERT_EQ(first.size(), 160u);
  EXPECT_EQ(first, second);
  double head = 0, tail = 0;
  for (int i = 0; i < 10; ++i) head += first[size_t(i)], tail += first[first.size() - 1 - size_t(i)];
  EXPECT_LT(tail, 0.5 * head);
  const auto x = codec::to_float(pixels);
  EXPECT_TRUE(at::equal(a->encode(x), b->encode(x)));
  EXPECT_TRUE(at::equal(a->decode(a->encode(x)), b->decode(b->encode(x))));
  const auto quality = codec::measure(*a, pixels);
  EXPECT_EQ(quality.pictures, 32);
  EXPECT_GT(quality.psnr, codec::measure(VqCodec(tiny(), 9), pixels).psnr + 3);
  EXPECT_GE(quality.used_codes, 8);
  EXPECT_LE(quality.perplexity, double(quality.used_codes) + 1e-9);
  EXPECT_NE(train_vq(tiny(), quick(20), 10, pixels).losses.front(), first.front());
}

// Shards of 14, 14 and 12 pictures on three threads: who computes which changes no bit. One thread has shards of other
// sizes, and the same training. Both precisions.
TEST_F(CodecTraining, ThreadsShareAStepAndRepeat) {
  const auto pixels = drawings(48, 12);
  for (const char* precision : {"float32", "bf16"}) {
    auto train = quick(12);
    train.batch_size = 40, train.precision = precision;
    const auto losses = [&](int threads) {
      at::set_num_threads(threads);
      const auto values = train_vq(tiny(), train, 9, pixels).losses;
      at::set_num_threads(1);
      return values;
    };
    const auto three = losses(3);
    EXPECT_EQ(losses(3), three) << precision;
    EXPECT_NEAR(losses(1).front(), three.front(), 1e-5 * three.front())
        << precision;  // sums in another order; the products of a row are the same
  }
}

// One step on three shards against plain autograd over the whole batch: AdamW's first update is lr towards the
// gradient's sign, where there is a gradient.
TEST_F(CodecTraining, AStepFollowsTheGradientOfTheWholeBatch) {
  const auto pixels = drawings(24, 12);
  auto train = quick(4);
  train.warm_share = train.freeze_share = 1;  // no codebook: an autoencoder
  train.batch_size = 24, train.weight_decay = 0, train.warmup = 0, train.l1 = 0, train.gradient = 0;
  at::set_num_threads(3);
  CodecTrainer trainer(tiny(), train, 9, pixels);
  const VqCodec before(tiny(), 9);
  const ParameterList parameters = parameters_of(before);
  std::vector<at::Tensor> leaves;
  for (const auto& [name, p] : parameters) leaves.push_back(p.requires_grad_(true));
  const auto x = codec::to_float(pixels);
  const auto mse = (before.render(before.embed(x)) - x).square().mean();
  const auto gradients = torch::autograd::grad({mse}, leaves);
  double squares = 0;
  for (const auto& g : gradients) squares += g.square().sum(at::kDouble).item<double>();

  const auto report = trainer.step(0, 0);
  EXPECT_NEAR(report.mse, mse.item<double>(), 1e-5);
  EXPECT_NEAR(report.grad_norm, std::sqrt(squares), 1e-4 * std::sqrt(squares));
  EXPECT_DOUBLE_EQ(report.lr_factor, 1.0);
  const auto after = trainer.finish();
  at::set_num_threads(1);
  const ParameterList moved = parameters_of(*after);
  for (size_t i = 0; i < moved.size(); ++i) {
    const auto expected = parameters[i].second.detach() - train.lr * gradients[i].sign();
    const auto clear =
        gradients[i].abs() > 1e-5;  // beyond float32's sums in another order, and far above AdamW's epsilon
    const auto error = ((moved[i].second - expected).abs() * clear).max().item<double>();
    EXPECT_LT(error, 0.01 * train.lr) << moved[i].first;
    EXPECT_GT(clear.sum().item<int64_t>(), 0) << moved[i].first;
  }
}

TEST_F(CodecTraining, TheLastPhaseMovesTheDecoderOnly) {
  const auto pixels = drawings(16, 12);
  auto train = quick(30);
  train.min_lr_ratio = 1, train.warm_share = 0.1, train.freeze_share = 1;
  const auto half = train_vq(tiny(), train, 9, pixels).codec;
  train.steps = 60, train.warm_share = 0.05, train.freeze_share = 0.5;
  const auto whole = train_vq(tiny(), train, 9, pixels).codec;
  const auto before = half->encoder_parameters(), after = whole->encoder_parameters();
  for (size_t i = 0; i < before.size(); ++i)
    EXPECT_TRUE(at::equal(before[i].second, after[i].second)) << before[i].first;
  EXPECT_TRUE(at::equal(half->codebook_NZ(), whole->codebook_NZ()));
  EXPECT_FALSE(at::equal(half->decoder_parameters()[0].second, whole->decoder_parameters()[0].second));
  EXPECT_GT(codec::measure(*whole, pixels).psnr, codec::measure(*half, pixels).psnr);
}

// The first update is lr at most, decay aside.
TEST_F(CodecTraining, MatricesAndConvolutionsDecayAlone) {
  auto train = quick(4);
  train.weight_decay = 10, train.lr = 0.01, train.warmup = 0;
  const VqCodec before(tiny(), 9);
  CodecTrainer trainer(tiny(), train, 9, drawings(16, 12));
  trainer.step(0, 0);
  const auto after = trainer.finish();
  const ParameterList was = parameters_of(before), is = parameters_of(*after);
  for (size_t i = 0; i < was.size(); ++i) {
    const auto& [name, p] = was[i];
    const double kept = p.dim() > 1 && name != "decoder.position" ? 0.9 : 1.0;
    EXPECT_LT((is[i].second - p * kept).abs().max().item<double>(), 1.001 * train.lr) << name;
  }
}

TEST_F(CodecTraining, ClipsTheGradientAndFollowsTheSchedule) {
  const auto pixels = drawings(16, 12);
  auto train = quick(10);
  CodecTrainer plain(tiny(), train, 9, pixels);
  const double norm = plain.step(0, 0).grad_norm;
  const auto expected = map_of(plain.optimizer_state());
  train.clip = norm / 2;
  CodecTrainer clipped(tiny(), train, 9, pixels);
  EXPECT_EQ(clipped.step(0, 0).grad_norm, norm);
  for (const auto& [name, tensor] : map_of(clipped.optimizer_state())) {
    if (!name.ends_with(".exp_avg")) continue;
    EXPECT_TRUE(at::allclose(2 * tensor, expected.at(name), 1e-5, 1e-12)) << name;
  }

  const auto factor = [&](ScheduleKind kind, int64_t step, double done) {
    train.schedule = kind;
    return CodecTrainer(tiny(), train, 9, pixels).step(step, done).lr_factor;
  };
  EXPECT_DOUBLE_EQ(factor(ScheduleKind::cosine, 2, 0.25),
                   0.6 * (0.02 + 0.98 * 0.5 * (1 + std::cos(std::numbers::pi / 4))));
  EXPECT_DOUBLE_EQ(factor(ScheduleKind::cosine, 7, 0.5), 0.51);
  EXPECT_DOUBLE_EQ(factor(ScheduleKind::linear, 7, 0.5), 0.51);
  EXPECT_DOUBLE_EQ(factor(ScheduleKind::constant, 0, 0.5), 0.2);
}

TEST_F(CodecTraining, AResumedTrainingIsBitIdenticalToAnUninterruptedOne) {
  const auto pixels = drawings(20, 12);
  struct Case {
    const char* name;
    void (*change)(CodecRunConfig&);
  };
  for (const auto& [name, change] : std::vector<Case>{
           {"float32", [](CodecRunConfig&) {}},
           {"bf16",
            [](CodecRunConfig& c) { c.train.precision = "bf16", c.train.clip = 0.5, c.checkpoint.async = false; }},
           {"adamw_8bit",
            [](CodecRunConfig& c) { c.train.optimizer = OptimizerKind::adamw_8bit, c.codec.mixer_width = 48; }}}) {
    SCOPED_TRACE(name);
    CodecRunConfig whole = config(std::string("whole-") + name), part = config(std::string("part-") + name);
    for (auto* c : {&whole, &part}) change(*c);
    const auto expected = CodecRun(whole, pixels).train();
    EXPECT_EQ(expected.step, 6);
    { CodecRun(part, pixels).train(); }
    const fs::path folder = codec_training_folder(part.dir), calm = codec_training_folder(whole.dir);
    for (const int64_t kept : {5, 3, 1}) {  // as if killed with this step saved last
      SCOPED_TRACE(kept);
      for (int64_t step = kept + 1; step <= 6; ++step)
        fs::remove_all(folder / "checkpoints" / checkpoint::step_name(step));
      const auto first_saved = fs::last_write_time(folder / "checkpoints" / checkpoint::step_name(1) / "manifest.json");
      const auto outcome = CodecRun(part, pixels, "auto").train();
      EXPECT_EQ(outcome.step, 6);
      EXPECT_EQ(fs::last_write_time(folder / "checkpoints" / checkpoint::step_name(1) / "manifest.json"), first_saved)
          << "it began anew";
      EXPECT_EQ(bytes_of(*outcome.codec), bytes_of(*expected.codec));
      for (const char* key : {"loss", "grad_norm", "lr_factor", "psnr"}) {
        EXPECT_EQ(training_column(folder, key), training_column(calm, key)) << key;
        EXPECT_EQ(training_column(folder, key).size(), 6u) << key;
      }
      EXPECT_EQ(moegraft::testing::metrics_of(folder).training.back().tokens, 6 * 8);
      const auto a = checkpoint::load(*checkpoint::find_latest(calm / "checkpoints")),
                 b = checkpoint::load(*checkpoint::find_latest(folder / "checkpoints"));
      EXPECT_EQ(a.step, 6);
      for (const auto& [key, tensor] : a.optimizer) EXPECT_TRUE(at::equal(tensor, b.optimizer.at(key))) << key;
      EXPECT_EQ(a.optimizer.contains("decoder.mixer.0.channel_in.weight.exp_avg.codes"),
                part.train.optimizer == OptimizerKind::adamw_8bit);
    }
  }
}

TEST_F(CodecTraining, KeepsItsNewestCheckpointsAndEndsOnlyOnce) {
  const auto pixels = drawings(20, 12);
  CodecRunConfig c = config("kept");
  c.checkpoint.keep = 2;
  std::string bytes;
  {
    CodecRun run(c, pixels);
    bytes = bytes_of(*run.train().codec);
    EXPECT_EQ(run.folder(), fs::path(c.dir + ".training"));
    const auto saved = checkpoint::list_checkpoints(run.folder() / "checkpoints");
    ASSERT_EQ(saved.size(), 2u);
    EXPECT_EQ(saved.back().filename(), checkpoint::step_name(6));
  }
  CodecRun again(c, pixels, "auto");  // as if killed before the codec was in its place
  const auto outcome = again.train();
  EXPECT_EQ(bytes_of(*outcome.codec), bytes);
  EXPECT_EQ(training_column(again.folder(), "loss").size(), 6u);
  again.remove();
  EXPECT_FALSE(fs::exists(c.dir + ".training"));
}

TEST_F(CodecTraining, RefusesWhatWouldLoseOrMixATraining) {
  const auto pixels = drawings(20, 12);
  CodecRunConfig c = config("refused");
  {
    CodecRun run(c, pixels);
    EXPECT_SAYS(UserError, "is in use by process", CodecRun(c, pixels));
    run.train();
  }
  const auto saved = [&] { return checkpoint::list_checkpoints(codec_training_folder(c.dir) / "checkpoints").size(); };
  EXPECT_SAYS(UsageError, "go on with it by --resume auto", CodecRun(c, pixels));
  CodecRunConfig other = c;
  other.train.lr = 1e-3, other.train.steps = 7;
  EXPECT_SAYS(UsageError, "it must keep train.lr (was 0.003, is 0.001), train.steps (was 6, is 7); put that back",
              CodecRun(other, pixels, "auto"));
  EXPECT_SAYS(UsageError, "other pictures than it began with", CodecRun(c, drawings(20, 12, 6), "auto"));
  EXPECT_EQ(saved(), 6u) << "what is refused changes nothing";
  CodecRunConfig same = c;  // what may differ
  same.train.log_every = 3, same.checkpoint.every = 4, same.data.eval = "held-out.jsonl",
  same.data.train[0].path = "elsewhere.jsonl";
  EXPECT_TRUE(codec_changes(c, same).empty());
  EXPECT_EQ(CodecRun(same, pixels, "auto").train().step, 6);
  fs::remove(codec_training_folder(c.dir) / "codec.yaml");
  EXPECT_SAYS(UsageError, "no codec.yaml", CodecRun(c, pixels, "auto"));
  { CodecRun anew(other, pixels, "auto", /*overwrite=*/true); }
  EXPECT_EQ(saved(), 0u);
  { EXPECT_EQ(CodecRun(other, pixels, "auto").train().step, 7); }
  { CodecRun anew(other, pixels, "none", /*overwrite=*/true); }
  EXPECT_EQ(saved(), 0u);
}

// Through the binary.
class CodecBinary : public ::testing::Test {
 protected:
  void SetUp() override {
    if (moegraft::testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
    fs::create_directories(folder_ / "pictures");
    const auto pixels = drawings(20, 12);
    for (int64_t i = 0; i < 20; ++i) io::save_image(folder_ / "pictures" / (std::to_string(i) + ".png"), pixels[i]);
    io::write_file_atomic(folder_ / "codec.yaml",
                          "dir: codec\ncodec: { image_size: 12, channels: [8, 16], encoder_blocks: [1, 0], "
                          "mixer_blocks: 1, mixer_width: 24, codebook_size: 16, code_width: 4 }\n"
                          "data: { train: [{ path: " +
                              (folder_ / "pictures").string() +
                              " }] }\n"
                              "train: { batch_size: 8, warmup: 5, precision: float32, log_every: 1 }\n");
  }
  std::vector<std::string> command(const std::string& name, int64_t steps, std::vector<std::string> more = {}) const {
    std::vector<std::string> all{moegraft::testing::moegraft_binary().string(),
                                 "codec",
                                 "train",
                                 "-c",
                                 (folder_ / "codec.yaml").string(),
                                 "--threads",
                                 "1",
                                 "--set",
                                 "dir=" + (folder_ / name).string(),
                                 "--set",
                                 "train.steps=" + std::to_string(steps),
                                 "--set",
                                 "checkpoint.every=3"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::string weights(const std::string& name) const { return io::read_file(folder_ / name / "model.safetensors"); }
  TemporaryFolder folder_;
};

TEST_F(CodecBinary, KilledAtRandomMomentsItEndsInTheSameBytes) {
  constexpr int64_t kSteps = 45;
  Process calm(command("calm", kSteps));
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(calm.wait().code, 0) << calm.errors();
  const double seconds = seconds_since(start);
  EXPECT_FALSE(fs::exists(folder_ / "calm.training"));

  Rng rng(7, "kill");
  int kills = 0;
  for (int round = 0; round < 60; ++round) {
    Process p(command("stormy", kSteps, {"--resume", "auto"}));
    // Growing patience: every attempt may be killed anywhere, yet the training must end.
    const double patience = rng.uniform() * seconds * (0.3 + 0.1 * round);
    for (const auto begin = std::chrono::steady_clock::now(); p.running() && seconds_since(begin) < patience;)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (p.running()) {
      EXPECT_FALSE(fs::exists(folder_ / "stormy/config.json") && !fs::exists(folder_ / "stormy/model.safetensors"));
      p.send(SIGKILL);
      p.wait();
      ++kills;
      continue;
    }
    const auto result = p.wait();
    ASSERT_EQ(result.code, 0) << result.err;
    break;
  }
  EXPECT_GT(kills, 0);
  EXPECT_EQ(weights("stormy"), weights("calm")) << "after " << kills << " kills";
  EXPECT_EQ(training_column(folder_ / "stormy", "loss"), training_column(folder_ / "calm", "loss"));
  EXPECT_EQ(training_column(folder_ / "stormy", "loss").size(), size_t(kSteps));
  EXPECT_FALSE(fs::exists(folder_ / "stormy.training"));
}

TEST_F(CodecBinary, ASignalSavesAndExitsWithItsOwnCode) {
  Process p(command("signal", 100000));
  const fs::path training = folder_ / "signal.training";
  const auto lines = [&] { return moegraft::testing::metrics_of(training).training; };
  for (int i = 0; i < 2000 && p.running() && lines().size() < 5; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  p.send(SIGTERM);
  const auto result = p.wait();
  EXPECT_EQ(result.code, run::kExitStopped) << result.err;
  EXPECT_FALSE(fs::exists(folder_ / "signal"));
  const auto latest = checkpoint::find_latest(training / "checkpoints");
  ASSERT_TRUE(latest);
  EXPECT_EQ(checkpoint::load(*latest).step, lines().back().step) << "nothing trained is lost";

  Process without(command("signal", 100000));
  const auto refused = without.wait();
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(refused.err.find("go on with it by --resume auto, begin anew with --overwrite"), std::string::npos)
      << refused.err;
  Process anew(command("signal", 6, {"--overwrite"}));
  EXPECT_EQ(anew.wait().code, 0) << anew.errors();
}

TEST_F(CodecBinary, AFinishedCodecIsKeptUnlessAnotherIsAskedFor) {
  ASSERT_EQ(Process(command("codec", 6)).wait().code, 0);
  const std::string bytes = weights("codec");
  const auto written = fs::last_write_time(folder_ / "codec/model.safetensors");
  const auto run = [&](int64_t steps, const std::vector<std::string>& more) {
    Process p(command("codec", steps, more));
    return p.wait();
  };
  EXPECT_NE(run(6, {}).err.find("holds a codec"), std::string::npos);
  for (const auto& more : std::vector<std::vector<std::string>>{{"--resume", "auto", "--json"},
                                                                {"--resume", "auto", "--overwrite", "--json"}}) {
    fs::create_directories(folder_ / "codec.training");  // of a process that was killed just before its end
    const auto again = run(6, more);
    EXPECT_EQ(again.code, 0) << again.err;
    EXPECT_EQ(io::Json::parse(again.out).at("steps"), 6);
    EXPECT_EQ(fs::last_write_time(folder_ / "codec/model.safetensors"), written);
    EXPECT_FALSE(fs::exists(folder_ / "codec.training"));
  }
  EXPECT_EQ(run(7, {"--resume", "auto"}).code, 2);
  EXPECT_EQ(weights("codec"), bytes);
  const auto other = run(7, {"--resume", "auto", "--overwrite"});
  EXPECT_EQ(other.code, 0) << other.err;
  EXPECT_NE(weights("codec"), bytes);
  EXPECT_EQ(training_column(folder_ / "codec", "loss").size(), 7u);
}

}  // namespace
}  // namespace moegraft::train
