// The contract that a graft leaves its base's text alone: separate processes through the moegraft binary, equal bits.
#include <gtest/gtest.h>

#include <cstring>

#include "libtorch.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/weights.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::evaluate {
namespace {

namespace fs = std::filesystem;
using testing::Process;

at::Tensor text_ids(int64_t B, int64_t S, int64_t vocab) {
  return (at::arange(B * S, at::kLong) * 7919 + 13).remainder(vocab).view({B, S});
}

bool equal_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() &&
         std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

class DriftContract : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new testing::TemporaryFolder("moegraft-drift");
    world_ = new testing::TinyWorld(testing::make_tiny_world(folder_->path() / "world"));
    vocab_ = model::read_spec(world_->base).vocab_size;
    // Every factor and row is a large random number, so that anything of the graft that reached text would show.
    testing::write_run(*world_, 2.0);
    const int64_t shapes[][2] = {{1, 1}, {3, 37}};
    for (const auto& s : shapes)
      io::save_safetensors(ids_file(s[0], s[1]), {{"input_ids", text_ids(s[0], s[1], vocab_)}});
  }
  static void TearDownTestSuite() {
    delete world_;
    delete folder_;
  }
  void SetUp() override {
    if (testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  }

  static fs::path ids_file(int64_t B, int64_t S) {
    return folder_->path() / ("ids-" + std::to_string(B) + "x" + std::to_string(S) + ".safetensors");
  }

  // Logits of the base's text columns, from a process of its own for each model: [0] of the base, [1] of the run.
  static std::array<at::Tensor, 2> both(const fs::path& run, int64_t B, int64_t S, std::vector<std::string> more,
                                        const std::vector<std::string>& run_only = {}) {
    std::array<at::Tensor, 2> out;
    std::array<std::unique_ptr<Process>, 2> processes;
    std::array<fs::path, 2> files;
    for (int i = 0; i < 2; ++i) {
      files[i] = folder_->path() / ("logits-" + std::to_string(i) + ".safetensors");
      std::vector<std::string> args{
          "logits", (i ? run : world_->base).string(), "--ids", ids_file(B, S).string(), "-o", files[i].string()};
      args.insert(args.end(), more.begin(), more.end());
      if (i) args.insert(args.end(), run_only.begin(), run_only.end());
      processes[i] = std::make_unique<Process>(testing::moegraft_command(args));
    }
    for (int i = 0; i < 2; ++i) {
      const auto result = processes[i]->wait();
      EXPECT_EQ(result.code, 0) << result.err;
      if (result.code != 0) continue;
      const at::Tensor logits = io::SafetensorsFile(files[i]).tensor("logits").clone();
      EXPECT_EQ(logits.sizes().vec(), (std::vector<int64_t>{B, S, i ? vocab_ + 18 : vocab_}));  // 16 codes, begin, end
      out[i] = logits.narrow(2, 0, vocab_);
    }
    return out;
  }

  static testing::TemporaryFolder* folder_;
  static testing::TinyWorld* world_;
  static int64_t vocab_;
};
testing::TemporaryFolder* DriftContract::folder_ = nullptr;
testing::TinyWorld* DriftContract::world_ = nullptr;
int64_t DriftContract::vocab_ = 0;

TEST_F(DriftContract, EveryBitOfTextLogitsIsTheBasesInBothTypes) {
  for (const std::string dtype : {"float32", "bfloat16"}) {
    for (const auto& [B, S] : {std::pair<int64_t, int64_t>{1, 1}, {3, 37}}) {
      const auto [base, run] = both(world_->run, B, S, {"--dtype", dtype});
      ASSERT_TRUE(base.defined() && run.defined());
      EXPECT_TRUE(equal_bits(base, run)) << dtype << " " << B << "x" << S << ": largest difference "
                                         << (base - run).abs().max().item<float>();
      EXPECT_GT(base.abs().max().item<float>(), 0.1);
    }
    const auto [base, run] = both(world_->run, 3, 37, {"--dtype", dtype, "--decode"});
    ASSERT_TRUE(base.defined() && run.defined());
    EXPECT_TRUE(equal_bits(base, run)) << dtype << " decoding token by token";
  }
}

// Base and graft from the same quantised weights: other logits than the floats', and still the same bits.
TEST_F(DriftContract, HoldsForAQuantisedBase) {
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const auto [base, run] = both(world_->run, 3, 37, {"--dtype", dtype, "--quantize", "q8_0"});
    const auto [floats, run_of_floats] = both(world_->run, 3, 37, {"--dtype", dtype});
    ASSERT_TRUE(base.defined() && run.defined() && floats.defined());
    EXPECT_TRUE(equal_bits(base, run)) << dtype;
    EXPECT_FALSE(equal_bits(base, floats)) << dtype;
    EXPECT_LT((base - floats).abs().mean().item<float>(), 0.05 * floats.abs().mean().item<float>());
  }
}

// Ragged texts packed end to end, as `eval` packs them: the summed likelihood in double must agree to the last digit.
TEST_F(DriftContract, PackedRaggedTextHasTheSameLikelihood) {
  io::Json results[2];
  for (int i = 0; i < 2; ++i) {
    const auto result = testing::run_moegraft({"eval", (i ? world_->run : world_->base).string(), "--text",
                                               world_->text_shards.string(), "--set", "sequence_length=64", "--json"});
    ASSERT_EQ(result.code, 0) << result.err;
    results[i] = io::Json::parse(result.out);
  }
  EXPECT_GT(results[0]["text"]["tokens"].get<int64_t>(), 100);
  EXPECT_EQ(results[0]["text"]["nll"].get<double>(), results[1]["text"]["nll"].get<double>());
  EXPECT_TRUE(results[1]["text"]["equal_bits"].get<bool>());
}

TEST_F(DriftContract, HoldsForTheRunAsInitialised) {
  testing::TinyWorld fresh = *world_;
  fresh.run = folder_->path() / "fresh";
  fresh.config.run.dir = fresh.run.string();
  testing::write_run(fresh);
  const auto [base, run] = both(fresh.run, 3, 37, {"--dtype", "float32"});
  EXPECT_TRUE(equal_bits(base, run));
}

// The control: with the gate opened for every token the same comparison must fail, and fail clearly.
TEST_F(DriftContract, AnOpenGateShows) {
  const auto [base, run] = both(world_->run, 3, 37, {"--dtype", "float32"}, {"--gate", "all"});
  ASSERT_TRUE(base.defined() && run.defined());
  EXPECT_GT((base - run).abs().max().item<float>(), 1e-2);
  const auto [again, none] = both(world_->run, 3, 37, {"--dtype", "float32"}, {"--gate", "none"});
  EXPECT_TRUE(equal_bits(again, none));
}

// The quick measure inside one process sees the same, and sees a leak.
TEST(DriftMeasure, IsExactForAGatedGraftAndNotForALeak) {
  const testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder / "world", {"olmoe", true, 2, 5});
  testing::write_run(world, 1.0);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    graft::OpenOptions open;
    open.dtype = dtype;
    auto model = graft::open_model(world.run, open);
    const int64_t vocab = model.decoder->total_vocab();
    const Drift drift = measure_drift(model, 1);
    EXPECT_EQ(drift.cases.size(), 4u);
    EXPECT_TRUE(drift.exact());
    EXPECT_EQ(drift.max_abs(), 0);
    EXPECT_GT(drift.gate_open, 1e-2);
    EXPECT_EQ(model.decoder->total_vocab(), vocab);  // all attached again

    auto leak = std::make_shared<adapters::ModalityLora>(model.decoder->spec(), model.config->adapters[0], 0,
                                                         std::vector<int64_t>{0, 1}, model.device());
    {
      const at::NoGradGuard no_grad;
      for (size_t i = 0; i < leak->factors().size(); ++i) {
        leak->factors()[i].A.copy_(model.adapters->adapters()[0]->factors()[i].A);
        leak->factors()[i].B.copy_(model.adapters->adapters()[0]->factors()[i].B);
      }
    }
    model.adapters = std::make_shared<adapters::AdapterStack>();
    model.adapters->add(leak);
    model.decoder->attach(model.adapters);
    const Drift leaking = measure_drift(model, 1);
    EXPECT_FALSE(leaking.exact());
    EXPECT_GT(leaking.max_abs(), 1e-2);
  }
}

}  // namespace
}  // namespace moegraft::evaluate
