// The memory plan against what autograd really keeps, and the runs that it steers.
#include "moegraft/planning/memory.h"

#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/base/check.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/model/random_base.h"
#include "moegraft/train/trainer.h"
#include "planning/gpu_memory.h"
#include "support/metrics.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::TemporaryFolder;

// Sums what this thread's allocations and releases of tensors come to.
class Tally : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override { net += bytes; }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t net = 0;
};

struct Case {
  const char* name;
  model::QkNorm norm;
  double clip;
  bool renormalise, sparse, bf16, open;
  bool shared = false;
  adapters::AdapterKind kind = adapters::AdapterKind::modality_lora;
};

model::DecoderSpec spec_of(const Case& c, int64_t layers) {
  model::DecoderSpec s;
  s.family = c.shared                            ? "qwen2_moe"
             : c.norm == model::QkNorm::per_head ? "qwen3_moe"
             : c.norm == model::QkNorm::full     ? "olmoe"
                                                 : "mixtral";
  s.vocab_size = 50, s.hidden_size = 64, s.num_layers = layers, s.num_heads = 4,
  s.num_kv_heads = s.family == "olmoe" ? 4 : 2, s.head_dim = 16;
  s.intermediate_size = c.sparse ? 48 : 96, s.moe_intermediate_size = 48, s.num_experts = 6, s.num_experts_per_tok = 2;
  if (s.family == "mixtral") s.intermediate_size = s.moe_intermediate_size;
  s.router.renormalise = c.renormalise, s.qk_norm = c.norm, s.clip_qkv = c.clip, s.max_positions = 512;
  if (c.shared) s.shared_expert = {80, true};
  s.layers.assign(size_t(layers), {c.sparse, 0});
  return s;
}

// Bytes that a forward pass leaves behind, its results included.
int64_t kept(const Case& c, const fs::path& dir, int64_t layers, int64_t recompute, int64_t tokens) {
  const model::DecoderSpec spec = spec_of(c, layers);
  if (!fs::exists(dir)) model::save_base(model::init_base(spec, {1.0, 3}), dir, at::kFloat);
  model::Decoder decoder(model::load_base(dir, {c.bf16 ? at::kBFloat16 : at::kFloat, at::kCPU}));
  adapters::AdapterConfig config;
  config.rank = 4;
  auto stack = std::make_shared<adapters::AdapterStack>();
  model::ParameterRegistry registry;
  config.kind = c.kind;
  auto adapter = adapters::make_adapter({spec, config, 0, {1}});
  adapter->register_parameters(registry);
  stack->add(std::move(adapter));
  decoder.attach(stack);
  model::PackedBatch batch = model::pack_rows(at::arange(tokens).remainder(50).view({1, tokens}));
  batch.modality_T = at::ones({tokens}, at::kLong);
  model::ForwardOptions options;
  options.gate = c.open ? model::Gate::all : model::Gate::modality;
  options.recompute_layers = recompute;
  decoder.forward(batch, options);  // packs the weights
  const auto tally = std::make_shared<Tally>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, tally);
  const auto result = decoder.forward(batch, options);
  return tally->net;
}

TEST(MemoryPlan, CountsWhatALayerKeeps) {
  const TemporaryFolder folder("moegraft_plan");
  constexpr int64_t kTokens = 192;
  const Case cases[] = {
      {"qwen3", model::QkNorm::per_head, 0, true, true, false, true},
      {"qwen3_bf16", model::QkNorm::per_head, 0, true, true, true, true},
      {"qwen3_gated", model::QkNorm::per_head, 0, true, true, false, false},
      {"qwen3_dense", model::QkNorm::per_head, 0, true, false, false, true},
      {"olmoe_clip", model::QkNorm::full, 2.0, false, true, false, true},
      {"olmoe_bf16_gated", model::QkNorm::full, 0, false, true, true, false},
      {"qwen3_dense_gated", model::QkNorm::per_head, 0, true, false, false, false},
      {"qwen3_dense_bf16", model::QkNorm::per_head, 0, true, false, true, false},
      {"mixtral", model::QkNorm::none, 0, true, true, false, true},
      {"qwen2", model::QkNorm::none, 0, true, true, false, false, true},
      {"qwen3_vera", model::QkNorm::per_head, 0, true, true, false, false, false, adapters::AdapterKind::vera},
      {"dense_vera", model::QkNorm::per_head, 0, true, false, true, true, false, adapters::AdapterKind::vera}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    planning::MemoryRequest r;
    r.spec = spec_of(c, 4);
    r.dtype = c.bf16 ? at::kBFloat16 : at::kFloat;
    r.tokens = kTokens, r.gate_open = c.open;
    r.adapters = {{4,
                   {model::Site::q, model::Site::k, model::Site::v, model::Site::o, model::Site::gate, model::Site::up,
                    model::Site::down},
                   {},
                   c.kind}};
    const planning::MemoryPlan plan = planning::plan_memory(r);
    // Two layers more, so that what belongs to no layer drops out.
    const auto of_layer = [&](bool recomputed) {
      const fs::path two = folder / (std::string(c.name) + "2"), four = folder / (std::string(c.name) + "4");
      return double(kept(c, four, 4, recomputed ? 4 : 0, kTokens) - kept(c, two, 2, recomputed ? 2 : 0, kTokens)) / 2;
    };
    EXPECT_NEAR(double(plan.layer_stored[2]) / of_layer(false), 1.0, 0.05);
    EXPECT_NEAR(double(plan.layer_recomputed[2]) / of_layer(true), 1.0, 0.05);
  }
}

// What a plan says of a quantised base is what it takes.
TEST(MemoryPlan, CountsAQuantisedBase) {
  if (!kernels::quantised_products()) GTEST_SKIP() << "its values are floats on this CPU path";
  for (const bool tied : {false, true})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      planning::MemoryRequest r;
      r.spec = spec_of({"qwen2", model::QkNorm::none, 0, true, true, false, false, true}, 3);
      r.spec.hidden_size = 80, r.spec.tie_word_embeddings = tied;
      r.spec.layers[1].sparse = false, r.spec.intermediate_size = 96;
      r.dtype = dtype, r.tokens = 64, r.quantise = kernels::WeightFormat::q8_0;
      const auto weights = model::random_base(r.spec, dtype, at::kCPU, 1, r.quantise).weights;
      int64_t bytes = weights->embedding_VD().bytes() + (tied ? 0 : weights->head_VD().bytes()),
              floats = weights->final_norm_D().numel();
      for (int64_t l = 0; l < r.spec.num_layers; ++l) {
        const model::LayerWeights w = weights->layer(l);
        for (const auto* m : {&w.attention.q, &w.attention.k, &w.attention.v, &w.attention.o, &w.dense.gate_ID,
                              &w.dense.up_ID, &w.dense.down_DI})
          bytes += m->bytes();
        for (const auto* t : {&w.input_norm_D, &w.post_norm_D, &w.attention.q_bias, &w.attention.k_bias,
                              &w.attention.v_bias, &w.attention.o_bias, &w.router_ED, &w.shared_scale_1D})
          floats += t->defined() ? t->numel() : 0;
        if (r.spec.layers[size_t(l)].sparse)
          bytes += kernels::stored_bytes(*weights->experts(l, 0, r.spec.num_experts).panels);
      }
      const planning::MemoryPlan plan = planning::plan_memory(r);
      EXPECT_EQ(plan.base, bytes + floats * int64_t(c10::elementSize(dtype)));
      EXPECT_EQ(plan.panels, 0);
    }
}

planning::MemoryRequest large() {
  planning::MemoryRequest r;
  Case c{"", model::QkNorm::per_head, 0, true, true, false, false};
  r.spec = spec_of(c, 8);
  r.tokens = 1 << 16;
  r.adapters = {{4, {model::Site::gate, model::Site::q}, {1, 2}}};
  return r;
}

TEST(MemoryPlan, RecomputesAsFewLayersAsTheBudgetTakes) {
  planning::MemoryRequest r = large();
  const planning::MemoryPlan free = planning::plan_memory(r);
  EXPECT_EQ(free.recompute_layers, 0);
  EXPECT_TRUE(free.fits());
  // Closed form: every layer's input, and one layer whole.
  int64_t inputs = 0;
  for (int64_t l = 0; l < 7; ++l) inputs += free.layer_recomputed[size_t(l)];
  EXPECT_EQ(free.smallest, free.total() - free.activations + inputs + free.layer_stored[7]);
  int64_t before = free.total();
  for (int64_t n = 1; n < 8; ++n) {
    r.budget_bytes = before - 1;
    const planning::MemoryPlan plan = planning::plan_memory(r);
    EXPECT_EQ(plan.recompute_layers, n);
    EXPECT_TRUE(plan.fits());
    EXPECT_NO_THROW(planning::check_fits(plan, r));
    before = plan.total();
  }
  EXPECT_EQ(before, free.smallest);
  r.budget_bytes = before - 1;
  const planning::MemoryPlan plan = planning::plan_memory(r);
  EXPECT_FALSE(plan.fits());
  try {
    planning::check_fits(plan, r);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("smallest possible total"), std::string::npos) << e.what();
  }
  r.auxiliary_loss = true;  // what trains from scratch cannot recompute
  EXPECT_EQ(planning::plan_memory(r).recompute_layers, 0);
}

TEST(MemoryPlan, AGpuHoldsTheLogitsOfOneChunkOfTheLoss) {
  planning::MemoryRequest r = large();
  r.device = at::kCUDA, r.dtype = at::kBFloat16, r.tokens = 4096, r.spec.vocab_size = 151936;
  const int64_t many = planning::plan_memory(r).loss;
  r.spec.vocab_size = 8;
  EXPECT_EQ(many - planning::plan_memory(r).loss, 2 * (1536 * 151936 - 4096 * 8));
}

TEST(MemoryPlan, CountsOverlaysOnlyAndOffloadedExpertsElsewhere) {
  planning::MemoryRequest r = large();
  // Two layers: gate A [E,P,D], B [E,F,P], q A [P,D], B [q,P].
  EXPECT_EQ(planning::count_trained(r).total(), 2 * (6 * 4 * (64 + 48) + 4 * (64 + 64)));
  int64_t listed = 0;
  for (const auto& row : planning::trained_table(r)) listed += row.parameters;
  EXPECT_EQ(listed, planning::count_trained(r).total());
  EXPECT_EQ(planning::format_trained(planning::trained_table(r), 1000).size(), planning::trained_table(r).size() + 1);
  const planning::MemoryPlan adamw = planning::plan_memory(r);
  EXPECT_EQ(adamw.optimizer, 8 * planning::count_trained(r).total());
  EXPECT_EQ(adamw.save_copies, 0);
  r.async_saves = true;
  EXPECT_EQ(planning::plan_memory(r).save_copies, 12 * planning::count_trained(r).total());
  EXPECT_EQ(planning::plan_memory(r).total(), adamw.total() + 12 * planning::count_trained(r).total());
  r.async_saves = false;
  r.prefix_cache = 5 << 20;
  EXPECT_EQ(planning::plan_memory(r).total(), adamw.total() + (5 << 20));
  r.prefix_cache = 0;
  r.moments_8bit = true;
  EXPECT_LT(planning::plan_memory(r).optimizer, adamw.optimizer / 3);
  r.device = at::kCUDA;
  const planning::MemoryPlan whole = planning::plan_memory(r);
  EXPECT_EQ(whole.base, 4 * r.spec.num_parameters());
  EXPECT_EQ(whole.panels + whole.heap, 0);
  r.offload_experts = true;
  const planning::MemoryPlan plan = planning::plan_memory(r);
  const int64_t layer = 3 * 6 * 64 * 48 * 4;
  EXPECT_EQ(plan.host_experts, 8 * layer);
  EXPECT_EQ(plan.base, whole.base - 8 * layer);
  EXPECT_EQ(plan.offload_buffers, 2 * layer);
  EXPECT_EQ(plan.recompute_layers, 8);
}

TEST(MemoryPlan, AGpuWithoutABudgetTakesMostOfWhatItHasFree) {
  planning::MemoryRequest r = large();
  r.device = at::Device(at::kCUDA, 0);
  r.free_bytes = planning::plan_memory(r).total();
  const planning::MemoryPlan plan = planning::plan_memory(r);
  EXPECT_EQ(plan.budget, int64_t(0.94 * double(r.free_bytes)));
  EXPECT_GT(plan.recompute_layers, 0);
  EXPECT_TRUE(plan.fits());
  EXPECT_NE(planning::summary(plan).find(" GiB, 0.94 of what cuda:0 has free; "), std::string::npos)
      << planning::summary(plan);
  r.budget_bytes = r.free_bytes;  // the config's word is the last
  EXPECT_EQ(planning::plan_memory(r).budget, r.free_bytes);
  EXPECT_EQ(planning::plan_memory(r).recompute_layers, 0);
  EXPECT_EQ(planning::summary(planning::plan_memory(r)).find("free"), std::string::npos);
  r.budget_bytes = 0, r.free_bytes = 1 << 20;
  try {
    planning::check_fits(planning::plan_memory(r), r);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("0.94 of what cuda:0 has free) is too little"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("set train.memory_budget_gib"), std::string::npos) << e.what();
  }
}

TEST(MemoryPlan, CountsWhatAGpuHoldsBesideTensors) {
  // Qwen3-30B-A3B's attention: dq in 5 splits for one sequence, 3 for two, 1 from 5 on, and dk, dv of 32 heads that
  // share 4 keys.
  const auto flash = [](int64_t sequences, int64_t kv_heads, int64_t head_dim) {
    return planning::gpu::flash_backward(4096, sequences, 32, kv_heads, head_dim, 2);
  };
  EXPECT_EQ(flash(1, 4, 128), 5 * 4224 * 32 * 128 * 4 + 32 * 4224 * 4 + 2 * 4096 * 32 * 128 * 2);
  EXPECT_EQ(flash(2, 4, 128), 3 * 4352 * 32 * 128 * 4 + 32 * 4352 * 4 + 2 * 4096 * 32 * 128 * 2);
  EXPECT_EQ(flash(5, 32, 128), 4736 * 32 * 128 * 4 + 32 * 4736 * 4);
  EXPECT_EQ(flash(5, 32, 72), 4736 * 32 * 96 * 4 + 32 * 4736 * 4);
  EXPECT_EQ(flash(5, 32, 200), 4736 * 32 * 256 * 4 + 32 * 4736 * 4);

  planning::MemoryRequest r = large();
  r.device = at::kCUDA, r.dtype = at::kBFloat16;
  for (auto& layer : r.spec.layers) layer.sparse = false;
  const planning::MemoryPlan many = planning::plan_memory(r);
  EXPECT_EQ(many.program, planning::gpu::kContext);
  EXPECT_EQ(many.collectives, 0);
  r.sequences = 1 << 10;
  const planning::MemoryPlan long_ones = planning::plan_memory(r);  // 33 splits of one sequence against one of many
  EXPECT_EQ(many.workspace - long_ones.workspace, planning::gpu::flash_backward(r.tokens, 1, 4, 2, 16, 2) -
                                                      planning::gpu::flash_backward(r.tokens, 1 << 10, 4, 2, 16, 2));
  r.dtype = at::kFloat;  // no flash kernel
  const planning::MemoryPlan wide = planning::plan_memory(r);
  r.sequences = 1;
  EXPECT_EQ(planning::plan_memory(r).workspace, wide.workspace);

  r.expert_size = 2;
  EXPECT_EQ(planning::plan_memory(r).collectives, 2 * planning::gpu::kNcclGroup + planning::gpu::kNcclPeer);
  r.data_size = 4, r.shard_base = r.shard_optimizer = true;
  EXPECT_EQ(planning::plan_memory(r).collectives, 5 * planning::gpu::kNcclGroup + planning::gpu::kNcclPeer);
  r.expert_size = 64, r.data_size = 1, r.spec.num_experts = 64;
  EXPECT_EQ(planning::plan_memory(r).collectives, 2 * planning::gpu::kNcclGroup + 7 * planning::gpu::kNcclPeer);
  const planning::MemoryPlan card = planning::plan_memory(r);
  EXPECT_EQ(card.total(), card.program + card.collectives + card.base + card.offload_buffers + card.trained +
                              card.gradients + card.optimizer + card.activations + std::max(card.loss, card.workspace));
  r.device = at::kCPU;
  EXPECT_EQ(planning::plan_memory(r).collectives, 0);
}

TEST(MemoryPlan, TheBaseInBfloat16TakesHalf) {
  planning::MemoryRequest r = large();
  for (const bool many_experts : {false, true}) {
    if (many_experts) {  // more than 512 MiB: experts lie in one layout, where that serves both passes
      r.spec.hidden_size = 512, r.spec.moe_intermediate_size = 256, r.spec.num_experts = 64;
      ASSERT_TRUE(model::packs_lean(r.spec));
      if (!kernels::one_layout_serves(at::kBFloat16)) continue;
    }
    r.dtype = at::kFloat;
    const planning::MemoryPlan wide = planning::plan_memory(r);
    r.dtype = at::kBFloat16;
    const planning::MemoryPlan narrow = planning::plan_memory(r);
    EXPECT_LE(double(narrow.base + narrow.panels), 0.6 * double(wide.base + wide.panels)) << many_experts;
  }
}

std::string adapter_bytes(const fs::path& run) {
  return io::read_file(*checkpoint::find_latest(run / "checkpoints") / "adapter.safetensors");
}

TEST(MemoryBudget, ARunThatMustRecomputeGivesTheSameBits) {
  const TemporaryFolder folder;
  moegraft::testing::TinyOptions options;
  options.layers = 3;
  const auto world = moegraft::testing::make_tiny_world(folder.path(), options);
  for (const char* dtype : {"float32", "bfloat16"}) {
    run::RunConfig plain = world.config, tight = world.config;
    plain.run.dir = (world.dir / (std::string("plain_") + dtype)).string(),
    tight.run.dir = (world.dir / (std::string("tight_") + dtype)).string();
    for (auto* c : {&plain, &tight}) c->model.dtype = dtype, c->train.sample_prompts.clear();
    train(plain);
    const graft::GraftedModel m = graft::open_model(plain.run.dir);
    const auto plan_of = [&](const run::RunConfig& c) {
      return planning::plan_memory(planning::memory_request(m.decoder->spec(), c, m.vocabulary, at::kCPU));
    };
    const planning::MemoryPlan free = plan_of(plain);
    tight.train.memory_budget_gib = double((free.total() + free.smallest) / 2) / double(int64_t{1} << 30);
    ASSERT_GE(plan_of(tight).recompute_layers, 1);
    train(tight);
    EXPECT_EQ(moegraft::testing::training_losses(plain.run.dir), moegraft::testing::training_losses(tight.run.dir));
    EXPECT_EQ(adapter_bytes(plain.run.dir), adapter_bytes(tight.run.dir));
  }
  run::RunConfig hopeless = world.config;
  hopeless.run.dir = (world.dir / "hopeless").string();
  hopeless.train.memory_budget_gib = 0.001;
  EXPECT_THROW(train(hopeless), UserError);
  EXPECT_FALSE(fs::exists(hopeless.run.dir)) << "planned before anything is made";
}

TEST(MemoryBudget, ARunWithOffloadedExpertsLearnsTheSame) {
  const TemporaryFolder folder;
  moegraft::testing::TinyOptions options;
  options.layers = 3;
  const auto world = moegraft::testing::make_tiny_world(folder.path(), options);
  run::RunConfig plain = world.config, away = world.config;
  away.run.dir = (world.dir / "away").string();
  away.model.offload = model::Offload::experts;
  train(plain);
  train(away);
  const auto a = moegraft::testing::training_losses(plain.run.dir),
             b = moegraft::testing::training_losses(away.run.dir);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_NEAR(a[i], b[i], 1e-4 * a[i]) << "step " << i;  // without panels, products sum in another order
  run::RunConfig full = away;
  full.train.base_weights = BaseWeights::full, full.train.allow_text_drift = true;
  EXPECT_THROW(full.validate(""), UsageError);
}

}  // namespace
}  // namespace moegraft::train
