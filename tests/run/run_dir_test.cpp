#include "moegraft/run/run_dir.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "moegraft/base/text.h"
#include "moegraft/io/files.h"

namespace fs = std::filesystem;

namespace moegraft::run {
namespace {

class RunDirTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() /
           ("moegraft_run_" + std::to_string(getpid()) + testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  RunConfig config(const std::vector<std::string>& overrides = {}) const {
    const std::string yaml = "run: { dir: " + dir_.string() + R"( }
model: { path: models/base }
modalities: { image: { codec: models/codec } }
adapters: [ { rank: 4 } ]
data: { train: [ { path: d.safetensors } ] }
)";
    return config::parse<RunConfig>(config::Document::from_string(yaml, overrides));
  }
  template <class E, class F>
  static std::string message_of(F&& f) {
    try {
      f();
    } catch (const E& e) { return e.what(); }
    return {};
  }
  fs::path dir_;
};

TEST_F(RunDirTest, CreateWritesTheTruth) {
  EXPECT_FALSE(is_run(dir_));
  const auto run = RunDir::create(config(), {});
  EXPECT_TRUE(is_run(dir_));
  EXPECT_EQ(config::dump(load_run_config(dir_)), config::dump(config()));
  const auto record = read_run_record(dir_);
  EXPECT_EQ(record.seed, 17);
  ASSERT_EQ(record.sessions.size(), 1u);
  for (const char* key : {"binary", "processor", "threads", "libtorch", "device"})
    EXPECT_TRUE(record.sessions[0].environment.contains(key)) << key;
  for (const auto& folder : {run.checkpoints(), run.samples(), run.tensorboard()})
    EXPECT_TRUE(fs::is_directory(folder));
}

// config.yaml as it was stored while train.precision and model.dtype could both ask for bfloat16.
TEST_F(RunDirTest, ARunFromBeforeAKeyMovedOpensAndGoesOn) {
  struct Case {
    const char *dtype, *precision, *now;
  };
  for (const Case& c : {Case{"float32", "float32", "float32"},
                        {"float32", "bf16", "bfloat16"},
                        {"bfloat16", "float32", "bfloat16"},
                        {"bfloat16", "bf16", "bfloat16"}}) {
    const auto now = config({std::string("model.dtype=") + c.now});
    { const auto run = RunDir::create(now, {}); }
    io::write_file_atomic(dir_ / "config.yaml", "run:\n  dir: " + dir_.string() + R"(
  seed: 17
model:
  path: models/base
  init: null
  dtype: )" + c.dtype + R"(
  device: auto
  offload: none
modalities:
  image:
    codec: models/codec
    begin: "<image>"
    end: "</image>"
adapters:
  - kind: modality_lora
    modality: [image]
    rank: 4
    alpha: 32.0
    use_rslora: false
    sites: [gate, up, down, q, k, v, o]
    layers: []
    init: kaiming_zero
    init_from: ""
embeddings:
  init: moment_match
data:
  train:
    - path: d.safetensors
      weight: 1.0
      sample_by: document
      add_bos: null
  eval: []
train:
  steps: 1000
  prefix_cache_mib: 0
  precision: )" + c.precision + R"(
  base_weights: frozen
)");
    EXPECT_EQ(load_run_config(dir_).model.dtype, c.now);
    EXPECT_EQ(config::dump(load_run_config(dir_)), config::dump(now));
    EXPECT_TRUE(RunDir::would_resume(now, {}));
  }
}

TEST_F(RunDirTest, ASecondRunIsRefused) {
  { const auto run = RunDir::create(config(), {}); }
  fs::create_directories(dir_ / "checkpoints/step-00000000");
  EXPECT_NE(message_of<UsageError>([&] { RunDir::create(config(), {}); }).find("--resume auto"), std::string::npos);
}

TEST_F(RunDirTest, AStartThatSavedNothingIsTakenOver) {
  {
    auto run = RunDir::create(config(), {});
    run.metrics.append(R"({"step":0,"eval":true})");
  }
  const auto corrected = config({"adapters[0].rank=8"});
  { const auto run = RunDir::create(corrected, {}); }
  EXPECT_EQ(config::dump(load_run_config(dir_)), config::dump(corrected));
  EXPECT_EQ(io::read_file(dir_ / "metrics.jsonl"), "");
}

TEST_F(RunDirTest, ALockThatIsALinkIsRefused) {
  fs::create_directories(dir_);
  const fs::path target = dir_.string() + ".precious";
  io::write_file_atomic(target, "precious");
  fs::create_symlink(target, dir_ / "lock");
  EXPECT_NE(message_of<UserError>([&] { RunDir::create(config(), {}); }).find("symbolic link"), std::string::npos);
  EXPECT_EQ(io::read_file(target), "precious");
  fs::remove(target);
}

TEST_F(RunDirTest, FingerprintsAreRecordedAndCompared) {
  { const auto run = RunDir::create(config(), {{"base", "1"}, {"codec.image", "2"}, {"data.train[0]", "3"}}); }
  struct Case {
    Fingerprints now;
    bool accept_data;
    const char* message;  // empty: goes on
  };
  const Case cases[] = {
      {{{"base", "1"}, {"codec.image", "2"}, {"data.train[0]", "3"}}, false, ""},
      {{{"base", "9"}, {"codec.image", "2"}, {"data.train[0]", "3"}}, true, "base "},
      {{{"base", "1"}, {"codec.image", "9"}, {"data.train[0]", "3"}}, true, "codec.image "},
      {{{"base", "1"}, {"codec.image", "2"}, {"data.train[0]", "9"}}, false, "--accept-changed data"},
      {{{"base", "1"}, {"codec.image", "2"}, {"data.train[0]", "9"}}, true, ""},
      {{{"base", "1"}, {"codec.image", "2"}, {"data.train[0]", "9"}}, false, ""},  // noted by the one before
  };
  for (const auto& c : cases) {
    if (*c.message)
      EXPECT_NE(
          message_of<UserError>([&] { RunDir::resume(config(), c.now, 1, "cpu", c.accept_data); }).find(c.message),
          std::string::npos)
          << c.message;
    else
      EXPECT_NO_THROW(RunDir::resume(config(), c.now, 1, "cpu", c.accept_data));
  }
  EXPECT_FALSE(read_run_record(dir_).sessions.back().accepted);
  EXPECT_EQ(read_run_record(dir_).sessions.at(2).accepted, std::vector<std::string>{"data.train[0]: 3 -> 9"});
}

TEST_F(RunDirTest, TwoProcessesCannotShareIt) {
  const auto run = RunDir::create(config(), {});
  EXPECT_NE(message_of<UserError>([&] { RunDir::resume(config(), {}, 0); }).find(std::to_string(getpid())),
            std::string::npos)
      << "same process";
  const pid_t child = fork();
  if (child == 0) {
    const auto message = message_of<UserError>([&] { RunDir::resume(config(), {}, 0); });
    _exit(message.find("process " + std::to_string(getppid())) != std::string::npos ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0) << "the owner is named";
}

TEST_F(RunDirTest, AKilledOwnerLeavesNoLock) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    const auto run = RunDir::create(config(), {});
    char c = 1;
    if (write(ready[1], &c, 1) != 1) _exit(1);
    pause();
  }
  char c;
  ASSERT_EQ(read(ready[0], &c, 1), 1);
  EXPECT_THROW(RunDir::resume(config(), {}, 0), UserError);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_NO_THROW(RunDir::resume(config(), {}, 0));
}

TEST_F(RunDirTest, ResumeTakesFreeKeysAndRefusesOthers) {
  { const auto run = RunDir::create(config(), {}); }
  const auto longer =
      config({"train.steps=2000", "checkpoint.keep=7", "train.sample_prompts=[a, b]", "model.device=cpu"});
  { const auto run = RunDir::resume(longer, {}, 10); }
  EXPECT_EQ(config::dump(load_run_config(dir_)), config::dump(longer));
  const auto sessions = read_run_record(dir_).sessions;
  ASSERT_EQ(sessions.size(), 2u);
  EXPECT_EQ(sessions[1].from_step, 10);
  EXPECT_NE(join(sessions[1].changed, "; ").find("train.steps: 1000 -> 2000"), std::string::npos);

  const std::vector<std::pair<std::string, std::string>> refused = {
      {"adapters[0].rank=8", "adapters[0].rank (was 4, is 8)"},
      {"run.seed=18", "run.seed"},
      {"train.lora.lr=0.5", "train.lora.lr"},
      {"data.train[1].path=x", "data.train[1].path (was nothing, is x)"},
      {"modalities.sound.codec=c", "modalities.sound.codec"},
      {"data.tokens_per_step=4096", "data.tokens_per_step"}};
  for (const auto& [override, expected] : refused) {
    // modalities.sound needs its own token names to be valid at all.
    std::vector<std::string> overrides = {override, "train.steps=2000", "checkpoint.keep=7",
                                          "train.sample_prompts=[a, b]", "model.device=cpu"};
    if (override.starts_with("modalities"))
      overrides.insert(overrides.end(), {"modalities.sound.begin=<s>", "modalities.sound.end=</s>"});
    const auto message = message_of<UsageError>([&] { RunDir::resume(config(overrides), {}, 10); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(message.find("train.steps (was"), std::string::npos) << message;
  }
  EXPECT_EQ(config::dump(load_run_config(dir_)), config::dump(longer)) << "a refusal changes nothing";
  EXPECT_EQ(read_run_record(dir_).sessions.size(), 2u);
}

TEST_F(RunDirTest, ResumeWithoutARunSaysSo) {
  EXPECT_NE(message_of<UserError>([&] { RunDir::resume(config(), {}, 0); }).find("holds no run"), std::string::npos);
  EXPECT_NE(message_of<UserError>([&] { load_run_config(dir_); }).find("not a run directory"), std::string::npos);
}

TEST_F(RunDirTest, MetricsAreCutBackToTheStep) {
  {
    auto run = RunDir::create(config(), {});
    for (int step = 1; step <= 4; ++step) run.metrics.append(R"({"step":)" + std::to_string(step) + R"(,"loss":1.5})");
    run.metrics.append(R"({"note":"no step"})");
    run.routing.append(R"({"step":3})");
    EXPECT_THROW(run.metrics.append("a\nb"), InvariantError);
  }
  std::ofstream(dir_ / "metrics.jsonl", std::ios::app) << R"({"step":2,"lo)";  // killed in mid-line
  auto run = RunDir::resume(config(), {}, 2);
  EXPECT_EQ(io::read_file(dir_ / "metrics.jsonl"),
            "{\"step\":1,\"loss\":1.5}\n{\"step\":2,\"loss\":1.5}\n{\"note\":\"no step\"}\n");
  EXPECT_EQ(io::read_file(dir_ / "routing.jsonl"), "");
  run.metrics.append(R"({"step":3})");
  EXPECT_TRUE(io::read_file(dir_ / "metrics.jsonl").ends_with("\n{\"step\":3}\n"));
}

TEST_F(RunDirTest, AFullDiskLeavesNoHalfLine) {
  auto run = RunDir::create(config(), {});
  run.metrics.append(R"({"step":1})");
  const auto before = io::read_file(dir_ / "metrics.jsonl");
  const auto previous = signal(SIGXFSZ, SIG_IGN);
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  rlimit tight = old;
  tight.rlim_cur = before.size() + 4;  // room for half a line
  setrlimit(RLIMIT_FSIZE, &tight);
  const auto message = message_of<UserError>([&] { run.metrics.append(R"({"step":2})"); });
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, previous);
  EXPECT_NE(message.find("metrics.jsonl"), std::string::npos);
  EXPECT_EQ(io::read_file(dir_ / "metrics.jsonl"), before);
}

}  // namespace
}  // namespace moegraft::run
