// Weights that come to a device through buffers: the bits of the plain loader. Here the device is the CPU, and buffers
// are small.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "../support/gpu.h"
#include "../support/paths.h"
#include "kernels/cuda/stack.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/weights.h"
#include "model/staged_load.h"

namespace moegraft::model {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/model";

// Every tensor that a provider gives, in one order; experts last.
std::vector<at::Tensor> tensors(const BaseModel& base, int64_t first, int64_t count) {
  WeightProvider& w = *base.weights;
  std::vector<at::Tensor> out{w.embedding_VD().tensor(), w.head_VD().tensor(), w.final_norm_D()};
  for (int64_t l = 0; l < base.spec.num_layers; ++l) {
    const LayerWeights x = w.layer(l);
    const AttentionWeights& a = x.attention;
    for (const at::Tensor& t : {x.input_norm_D, x.post_norm_D, a.q.tensor(), a.k.tensor(), a.v.tensor(), a.o.tensor(),
                                a.q_bias, a.k_bias, a.v_bias, a.o_bias, a.q_norm, a.k_norm, x.router_ED,
                                x.dense.gate_ID.tensor(), x.dense.up_ID.tensor(), x.dense.down_DI.tensor()})
      if (t.defined()) out.push_back(t);
    if (!base.spec.layers[size_t(l)].sparse) continue;
    const ExpertWeights e = w.experts(l, first, count);
    for (const auto* list : {&e.gate_FD, &e.up_FD, &e.down_DF}) out.insert(out.end(), list->begin(), list->end());
  }
  return out;
}

void expect_same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].scalar_type(), b[i].scalar_type()) << i;
    EXPECT_TRUE(at::equal(a[i].cpu(), b[i].cpu())) << "tensor " << i;
  }
}

// Of another dtype on disk, or in the fused form, or not aligned.
class StagedLoads : public ::testing::Test {
 protected:
  StagedLoads() : dir_(fs::temp_directory_path() / ("moegraft_staged_" + std::to_string(::getpid()))) {}
  ~StagedLoads() override { fs::remove_all(dir_); }
  fs::path dir_;
};

TEST_F(StagedLoads, GiveTheBitsOfThePlainLoader) {
  for (const char* name : {"olmoe", "olmoe_clip_norm_tied", "qwen3_mixed", "mixtral_window"})
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf})
      for (const Staging& staging : {Staging{4096, 2, 1024, 3}, Staging{1 << 16, 3, 64, 1}, Staging{}}) {
        SCOPED_TRACE(testing::Message() << name << " " << dtype << " " << staging.buffer_bytes);
        LoadOptions plain{dtype, at::kCPU}, staged = plain;
        staged.staging = staging;
        const int64_t E = read_spec(kGolden / name).num_experts;
        expect_same(tensors(load_base(kGolden / name, staged), 0, E), tensors(load_base(kGolden / name, plain), 0, E));
        for (LoadOptions* o : {&plain, &staged})
          o->first_expert = 1, o->num_experts = E - 2;  // one process's of several
        expect_same(tensors(load_base(kGolden / name, staged), 1, E - 2),
                    tensors(load_base(kGolden / name, plain), 1, E - 2));
      }
}

TEST_F(StagedLoads, ALayerLiesAsDevicesWantIt) {
  LoadOptions options;
  options.staging = Staging{4096, 2, 1024, 2};
  const BaseModel base = load_base(kGolden / "olmoe", options);
  const ExpertWeights e = base.weights->experts(0, 0, base.spec.num_experts);
  const at::Tensor gate = kernels::cuda::stacked_view(e.gate_FD), up = kernels::cuda::stacked_view(e.up_FD);
  ASSERT_TRUE(gate.defined() && up.defined() && kernels::cuda::stacked_view(e.down_DF).defined());
  EXPECT_TRUE(e.gate_FD.stacked().is_same(base.weights->experts(0, 0, base.spec.num_experts).gate_FD.stacked()))
      << "handed out, not made anew";
  EXPECT_TRUE(kernels::cuda::joined_view(gate, up).defined());
}

// The golden weights under the names that transformers 5 has in memory: one tensor for all experts.
TEST_F(StagedLoads, FusedExpertsAndOthersDtypes) {
  const fs::path from = kGolden / "olmoe";
  const DecoderSpec s = read_spec(from);
  for (const auto stored : {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble}) {
    io::TensorMap fused;
    for (const auto& [name, tensor] : io::load_safetensors(from / "model.safetensors"))
      if (name.find(".experts.") == std::string::npos) fused[name] = tensor.to(stored);
    const auto all = io::load_safetensors(from / "model.safetensors");
    for (int64_t l = 0; l < s.num_layers; ++l) {
      const std::string prefix = "model.layers." + std::to_string(l) + ".mlp.experts.";
      std::vector<at::Tensor> gate_up, down;
      for (int64_t e = 0; e < s.num_experts; ++e) {
        const std::string expert = prefix + std::to_string(e) + ".";
        gate_up.push_back(at::cat({all.at(expert + "gate_proj.weight"), all.at(expert + "up_proj.weight")}));
        down.push_back(all.at(expert + "down_proj.weight"));
      }
      fused[prefix + "gate_up_proj"] = at::stack(gate_up).to(stored),
                     fused[prefix + "down_proj"] = at::stack(down).to(stored);
    }
    fs::create_directories(dir_);
    fs::copy_file(from / "config.json", dir_ / "config.json", fs::copy_options::overwrite_existing);
    io::save_safetensors(dir_ / "model.safetensors", fused);
    for (const auto dtype : {at::kFloat, at::kBFloat16})
      for (const bool part : {false, true}) {
        LoadOptions plain{dtype, at::kCPU}, staged = plain;
        staged.staging = Staging{4096, 2, 512, 2};
        if (part)
          for (LoadOptions* o : {&plain, &staged}) o->first_expert = 2, o->num_experts = 2;
        const auto of = [&](const LoadOptions& o) {
          return tensors(load_base(dir_, o), part ? 2 : 0, part ? 2 : s.num_experts);
        };
        expect_same(of(staged), of(plain));
      }
  }
}

TEST_F(StagedLoads, AFileThatDoesNotAlignItsTensors) {
  fs::create_directories(dir_);
  fs::copy_file(kGolden / "qwen3" / "config.json", dir_ / "config.json");
  std::string file = io::read_file(kGolden / "qwen3" / "model.safetensors");
  uint64_t header;
  std::memcpy(&header, file.data(), 8);
  file.insert(8 + header, " ");
  ++header;
  std::memcpy(file.data(), &header, 8);
  io::write_file_atomic(dir_ / "model.safetensors", file);
  LoadOptions staged;
  staged.staging = Staging{4096, 2, 512, 2};
  const int64_t E = read_spec(dir_).num_experts;
  expect_same(tensors(load_base(dir_, staged), 0, E), tensors(load_base(kGolden / "qwen3"), 0, E));
}

TEST_F(StagedLoads, ErrorsAreOneLine) {
  const fs::path file = kGolden / "qwen3" / "model.safetensors";
  const int64_t bytes = int64_t(fs::file_size(file));
  StagedLoad load(at::kCPU, {4096, 2, 512, 2});
  load.add({file, bytes - 64, 128}, at::kFloat, at::empty({32}));
  try {
    load.run("");
    FAIL() << "half of it is not there";
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find(
                  detail::concat("model.safetensors has ", bytes, " bytes, ", bytes + 64, " are needed")),
              std::string::npos)
        << e.what();
  }
  EXPECT_THROW(load.add({file, 0, 128}, at::kFloat, at::empty({31})), InvariantError);
  EXPECT_THROW(load.add({file, 0, 128}, at::kFloat, at::empty({4, 16}).t()), InvariantError);
}

TEST(Cuda, AStagedLoadGivesTheBitsOfTheFiles) {
  MOEGRAFT_NEEDS_GPU();
  for (const char* name : {"olmoe", "qwen3_mixed"})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      LoadOptions there{dtype, at::kCUDA};
      there.staging = Staging{4096, 2, 1024, 3};
      const BaseModel base = load_base(kGolden / name, there), small = load_base(kGolden / name, {dtype, at::kCUDA}),
                      files = load_base(kGolden / name);
      const int64_t E = files.spec.num_experts;
      std::vector<at::Tensor> want;
      for (const at::Tensor& t : tensors(files, 0, E)) want.push_back(t.to(dtype));
      expect_same(tensors(base, 0, E), want);
      expect_same(tensors(small, 0, E), want);
    }
}

}  // namespace
}  // namespace moegraft::model
