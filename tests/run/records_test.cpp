// Lines of metrics.jsonl and run.json: what is written to the byte, what earlier versions wrote, what a kill leaves,
// what later versions may add.
#include "moegraft/run/records.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/routing/stats.h"
#include "moegraft/run/run_dir.h"

namespace fs = std::filesystem;

namespace moegraft::run {
namespace {

TrainingLine plain_line() {
  TrainingLine line;
  line.step = 20, line.tokens = 40960, line.epochs = 0.5, line.seconds = 12;
  line.loss = 2.25, line.grad_norm = 1e-7, line.lr_factor = 1;
  line.nll = {{"image", 3.125}, {"text", 0.1}};
  line.tokens_per_s = 3413.3333333333335;
  return line;
}

TrainingLine full_line() {
  TrainingLine line = plain_line();
  line.truncated_documents = 3, line.skipped_documents = 0;
  line.busy_seconds_by_rank = {{0.5, 0.25}};
  line.data_wait_share = 0.0, line.checkpoint_stall_share = 0.125, line.prefix_cache_hit_share = 0.75,
  line.comm_wait_share = 0.0625, line.comm_mib_per_step = 8;
  line.psnr = 21.5;
  return line;
}

class Records : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("moegraft_records_" + std::to_string(getpid()) +
                                        testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path file() const { return dir_ / "metrics.jsonl"; }
  void append(const std::string& text) const { std::ofstream(file(), std::ios::app | std::ios::binary) << text; }
  Metrics metrics_of(const std::string& text) const {
    io::write_file_atomic(file(), text);
    return read_metrics(file());
  }
  template <class F>
  static std::string error_of(F&& f) {
    try {
      f();
    } catch (const UserError& e) { return e.what(); }
    return "no error";
  }
  fs::path dir_;
};

// The names of keys and the form of numbers are an interface: other programs read these files.
TEST_F(Records, LinesAreWrittenToTheByte) {
  EXPECT_EQ(
      to_json_line(plain_line()),
      R"({"epochs":0.5,"grad_norm":1e-07,"loss":2.25,"lr_factor":1.0,"nll_image":3.125,"nll_text":0.1,"seconds":12.0,"step":20,"tokens":40960,"tokens_per_s":3413.3333333333335})");
  EXPECT_EQ(
      to_json_line(full_line()),
      R"({"busy_seconds_by_rank":[0.5,0.25],"checkpoint_stall_share":0.125,"comm_mib_per_step":8.0,"comm_wait_share":0.0625,"data_wait_share":0.0,"epochs":0.5,"grad_norm":1e-07,)"
      R"("loss":2.25,"lr_factor":1.0,"nll_image":3.125,"nll_text":0.1,"prefix_cache_hit_share":0.75,"psnr":21.5,"seconds":12.0,"skipped_documents":0,"step":20,"tokens":40960,)"
      R"("tokens_per_s":3413.3333333333335,"truncated_documents":3})");
  EvaluationLine evaluation;
  evaluation.step = 40;
  evaluation.nll = {{"image", 3.5}, {"text", std::numeric_limits<double>::quiet_NaN()}};
  EXPECT_EQ(to_json_line(evaluation), R"({"eval":true,"eval_nll_image":3.5,"eval_nll_text":null,"step":40})");
}

TEST_F(Records, LinesReadBack) {
  EvaluationLine evaluation;
  evaluation.step = 20;
  evaluation.nll = {{"image", 0.1 + 0.2}};
  const auto metrics = metrics_of(to_json_line(plain_line()) + "\n" + to_json_line(evaluation) + "\n" +
                                  to_json_line(full_line()) + "\n");
  EXPECT_EQ(metrics.training, (std::vector{plain_line(), full_line()}));
  EXPECT_EQ(metrics.evaluations, std::vector{evaluation});
  const auto nan = metrics_of(R"({"step":1,"eval":true,"eval_nll_image":null})"
                              "\n");
  EXPECT_TRUE(std::isnan(nan.evaluations.at(0).nll.at("image")));
}

TEST_F(Records, MeasuresAreWhatCurvesAreDrawnOf) {
  EXPECT_EQ(measures(plain_line()), (std::map<std::string, double>{{"loss", 2.25},
                                                                   {"grad_norm", 1e-7},
                                                                   {"lr_factor", 1},
                                                                   {"nll_image", 3.125},
                                                                   {"nll_text", 0.1},
                                                                   {"tokens_per_s", 3413.3333333333335}}));
  const auto all = measures(full_line());
  for (const char* key : {"data_wait_share", "checkpoint_stall_share", "prefix_cache_hit_share", "comm_wait_share",
                          "comm_mib_per_step", "psnr"})
    EXPECT_TRUE(all.contains(key)) << key;
  EXPECT_EQ(all.size(), 12u);
}

// As the first version of the training loop wrote them.
TEST_F(Records, AnOldFileReads) {
  const auto metrics = metrics_of(
      R"({"eval":true,"eval_nll_image":5.544,"step":0})"
      "\n"
      R"({"epochs":0.0234375,"grad_norm":0.7071067811865476,"loss":5.53125,"lr_factor":0.02,"nll_image":5.53125,"seconds":0.75,"step":1,"tokens":1024,"tokens_per_s":1365.3333333333333})"
      "\n");
  ASSERT_EQ(metrics.training.size(), 1u);
  EXPECT_EQ(metrics.training[0].tokens, 1024);
  EXPECT_EQ(metrics.training[0].nll.at("image"), 5.53125);
  EXPECT_FALSE(metrics.training[0].truncated_documents || metrics.training[0].data_wait_share);
  EXPECT_EQ(metrics.evaluations.at(0).nll.at("image"), 5.544);
}

TEST_F(Records, ATornLastLineIsLeftOut) {
  const std::string whole = to_json_line(plain_line()) + "\n", next = to_json_line(full_line());
  for (const size_t bytes : {size_t{1}, next.size() / 2, next.size()})
    EXPECT_EQ(metrics_of(whole + next.substr(0, bytes)).training, std::vector{plain_line()}) << bytes;
  EXPECT_TRUE(metrics_of("").training.empty());
  fs::remove(file());
  EXPECT_TRUE(read_metrics(file()).training.empty()) << "no line was written yet";
}

TEST_F(Records, LinesAndKeysOfLaterVersionsArePassedOver) {
  std::string later = to_json_line(plain_line());
  later.insert(1, R"("a_new_measure":{"deep":[1]},)");
  const auto metrics = metrics_of(R"({"kind":"sample","step":3})"
                                  "\n"
                                  R"({"eval":"images","step":3})"
                                  "\n" +
                                  later + "\n");
  EXPECT_EQ(metrics.training, std::vector{plain_line()});
  EXPECT_TRUE(metrics.evaluations.empty());
}

TEST_F(Records, WhatDoesNotReadIsNamedByFileAndLine) {
  struct Case {
    std::string line, message;
  };
  for (const auto& c :
       {Case{R"({"step":2,"lo)", ":2: not valid JSON"}, Case{"[]", ":2: expected a JSON object, got array"},
        Case{R"({"loss":1.5})", ":2: \"step\" is missing"},
        Case{R"({"step":2,"eval":true,"eval_nll_image":"low"})", R"(:2: "eval_nll_image" must be a number, got "low")"},
        Case{R"({"step":2.5,"eval":true})", ":2: \"step\" must be an integer, got 2.5"},
        Case{std::string(200, '[') + std::string(200, ']'), ":2: brackets nest 200 deep"}}) {
    const auto error = error_of(
        [&] { metrics_of(to_json_line(plain_line()) + "\n" + c.line + "\n" + to_json_line(plain_line()) + "\n"); });
    EXPECT_NE(error.find(file().string() + c.message), std::string::npos) << error;
  }
}

TEST_F(Records, AGrowingFileIsFollowed) {
  TrainingLine line = plain_line();
  const auto text_of = [&](int64_t step) {
    line.step = step, line.seconds = double(step);
    return to_json_line(line) + "\n";
  };
  const auto steps = [](const Metrics& m) {
    std::vector<int64_t> out;
    for (const auto& l : m.training) out.push_back(l.step);
    return out;
  };
  Metrics metrics = read_metrics(file());
  append(text_of(1));
  read_more(file(), metrics);
  EXPECT_EQ(steps(metrics), (std::vector<int64_t>{1}));
  const std::string second = text_of(2);
  append(second.substr(0, 30));
  read_more(file(), metrics);
  EXPECT_EQ(steps(metrics), (std::vector<int64_t>{1}));
  append(second.substr(30) + text_of(3));
  read_more(file(), metrics);
  read_more(file(), metrics);
  EXPECT_EQ(steps(metrics), (std::vector<int64_t>{1, 2, 3}));
  append("{}x\n");
  EXPECT_NE(error_of([&] { read_more(file(), metrics); }).find("metrics.jsonl:4: "), std::string::npos);
  // Cut back by a resume: shorter than what was read, then as long, with other lines.
  io::write_file_atomic(file(), text_of(1));
  read_more(file(), metrics);
  EXPECT_EQ(steps(metrics), (std::vector<int64_t>{1}));
  io::write_file_atomic(file(), text_of(7) + text_of(8));
  read_more(file(), metrics);
  EXPECT_EQ(steps(metrics), (std::vector<int64_t>{7, 8}));
}

TEST_F(Records, RoutingReadsBack) {
  const std::string line = routing::to_json_line({{"text", "image"}, 4, {}}, 20) + "\n";
  const auto path = dir_ / "routing.jsonl";
  io::write_file_atomic(path, line + line + line.substr(0, 10));
  const auto lines = read_routing(path);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[1].step, 20);
  EXPECT_EQ(lines[1].report.num_experts, 4);
  io::write_file_atomic(path, line + "{}\n");
  EXPECT_NE(error_of([&] { read_routing(path); }).find("routing.jsonl:2: "), std::string::npos);
}

RunConfig config_in(const fs::path& dir) {
  return config::parse<RunConfig>(config::Document::from_string("run: { dir: " + dir.string() + R"( }
model: { path: models/base }
modalities: { image: { codec: models/codec } }
adapters: [ { rank: 4 } ]
data: { train: [ { path: d.safetensors } ] }
)"));
}

TEST_F(Records, RunJsonReadsBack) {
  const auto config = config_in(dir_);
  {
    auto run = RunDir::create(config, {{"base", "1"}, {"data.train[0]", "3"}});
    run.note_trainable({{"adapters[0] gate, rank 4", "2 layers x 4 experts", 100, 400}});
    for (const int64_t step : {3, 5}) run.note_warning({step, "constant_loss", "the loss has been 1"});
  }
  { const auto run = RunDir::resume(config, {{"base", "1"}, {"data.train[0]", "4"}}, 6, "cpu", /*accept_data=*/true); }
  const auto record = read_run_record(dir_);
  EXPECT_EQ(record.format, "moegraft run");
  EXPECT_EQ(record.version, 1);
  EXPECT_EQ(record.seed, 17);
  EXPECT_EQ(record.git_commit, git_commit());
  EXPECT_EQ(record.fingerprints, (Fingerprints{{"base", "1"}, {"data.train[0]", "4"}}));
  EXPECT_EQ(record.trainable,
            (std::vector<TrainedRow>{{"adapters[0] gate, rank 4", "2 layers x 4 experts", 100, 400}}));
  EXPECT_EQ(record.warnings, (std::vector<Warning>{{3, "constant_loss", "the loss has been 1"},
                                                   {5, "constant_loss", "the loss has been 1"}}));
  EXPECT_FALSE(record.branched_from);
  ASSERT_EQ(record.sessions.size(), 2u);
  EXPECT_EQ(record.sessions[0].from_step, 0);
  EXPECT_EQ(record.sessions[0].pid, getpid());
  EXPECT_EQ(record.sessions[0].environment, describe_environment("cpu"));
  EXPECT_FALSE(record.sessions[0].accepted);
  EXPECT_EQ(record.sessions[1].from_step, 6);
  EXPECT_EQ(record.sessions[1].accepted, std::vector<std::string>{"data.train[0]: 3 -> 4"});
}

// As it was written before fingerprints, trained rows and warnings, with a key from elsewhere: it reads, and an edit
// leaves every other byte.
TEST_F(Records, AnOldRunJsonReadsAndKeepsWhatItHolds) {
  const auto config = config_in(dir_);
  { const auto run = RunDir::create(config, {}); }
  const std::string before = R"({
  "cluster": "north",
  "format": "moegraft run",
  "git_commit": "abc",
  "moegraft": "0.1.0",
  "seed": 17,
  "sessions": [
    {
      "changed": [],
      "cores": 4,
      "environment": {
        "binary": "0123456789abcdef",
        "threads": "4"
      },
      "from_step": 0,
      "host": "here",
      "pid": 7,
      "started": "2025-01-01T00:00:00Z"
    }
  ],
  "version": 1)";
  io::write_file_atomic(dir_ / "run.json", before + "\n}\n");
  EXPECT_TRUE(recorded_fingerprints(dir_).empty());
  EXPECT_EQ(read_run_record(dir_).sessions.at(0).cores, 4);
  {
    auto run = RunDir::resume(config, {}, 2);
    io::write_file_atomic(dir_ / "run.json", before + "\n}\n");
    run.note_warning({3, "zero_gradient", "the gradient is exactly 0"});
  }
  EXPECT_EQ(io::read_file(dir_ / "run.json"), before + R"(,
  "warnings": [
    {
      "check": "zero_gradient",
      "step": 3,
      "text": "the gradient is exactly 0"
    }
  ]
}
)");
}

TEST_F(Records, ADamagedRunJsonNamesItsKey) {
  const auto path = dir_ / "run.json";
  io::write_file_atomic(
      path,
      R"({"format":"moegraft run","version":1,"moegraft":"0.1.0","git_commit":"abc","seed":17,"sessions":[],"fingerprints":{"base":7}})");
  EXPECT_EQ(error_of([&] { read_run_record(dir_); }), path.string() + R"(: "fingerprints".base must be a text, got 7)");
  io::write_file_atomic(path, "[]");
  EXPECT_EQ(error_of([&] { read_run_record(dir_); }), path.string() + " must be an object, got []");
}

}  // namespace
}  // namespace moegraft::run
