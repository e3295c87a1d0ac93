#include "moegraft/adapters/modality_lora.h"
#include "moegraft/exporting/peft.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include "libtorch.h"

#include <csignal>
#include <functional>

#include "exporting/peft_config.h"
#include "exporting/peft_layout.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/batch.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft::exporting {
namespace {

namespace fs = std::filesystem;
using io::Json;
using testing::TemporaryFolder;
using testing::TinyWorld;

// The factors are copied bit for bit; the verification sums their products in float64, in another order.
constexpr double kExact = 1e-14;

model::DecoderSpec small_spec() {
  model::DecoderSpec s;
  s.family = "qwen3_moe", s.vocab_size = 10, s.hidden_size = 4, s.num_layers = 2, s.num_heads = 2, s.num_kv_heads = 1,
  s.head_dim = 2;
  s.moe_intermediate_size = 3, s.num_experts = 3, s.num_experts_per_tok = 1;
  s.layers.assign(2, {});
  return s;
}

std::shared_ptr<adapters::ModalityLora> make_lora(const model::DecoderSpec& spec, std::vector<std::string> sites,
                                                  std::vector<int64_t> layers = {}, double alpha = 4) {
  adapters::AdapterConfig c;
  c.rank = 2, c.alpha = alpha, c.sites = std::move(sites), c.layers = std::move(layers);
  return std::make_shared<adapters::ModalityLora>(spec, c, 0, std::vector<int64_t>{1}, at::kCPU);
}

// Every element says where it is: A[e,k,i] = 100e + 10k + i + 1, B[e,o,k] = -(100e + 10o + k + 1).
void number(adapters::ModalityLora& lora) {
  const at::NoGradGuard no_grad;
  for (auto& f : lora.factors())
    for (const auto& [t, sign] : {std::pair(f.A, 1.0), std::pair(f.B, -1.0)}) {
      const at::Tensor v = t.dim() == 3 ? t : t.unsqueeze(0);
      for (int64_t e = 0; e < v.size(0); ++e)
        for (int64_t a = 0; a < v.size(1); ++a)
          for (int64_t b = 0; b < v.size(2); ++b) v[e][a][b].fill_(sign * double(100 * e + 10 * a + b + 1));
    }
}

TEST(PeftLayout, ExpertRowsAndColumns) {
  const auto lora = make_lora(small_spec(), {"down"}, {1});
  number(*lora);
  const auto targets = collect_targets(small_spec(), {lora});
  ASSERT_EQ(targets.size(), 1u);
  EXPECT_EQ(targets[0].path(), "model.layers.1.mlp.experts.down_proj");
  const Factors f = pack(targets[0], 2.0);
  ASSERT_EQ(f.A.sizes().vec(), (std::vector<int64_t>{6, 3}));
  ASSERT_EQ(f.B.sizes().vec(), (std::vector<int64_t>{4, 6}));
  for (int64_t e = 0; e < 3; ++e)
    for (int64_t k = 0; k < 2; ++k) {
      for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(f.A[e * 2 + k][i].item<float>(), float(100 * e + 10 * k + i + 1));
      for (int64_t o = 0; o < 4; ++o) EXPECT_EQ(f.B[o][k * 3 + e].item<float>(), -float(100 * e + 10 * o + k + 1));
    }
}

TEST(PeftLayout, GateAndUpBecomeOneTargetOfTwiceTheRank) {
  const auto lora = make_lora(small_spec(), {"gate", "up"}, {0});
  number(*lora);
  const auto targets = collect_targets(small_spec(), {lora});
  ASSERT_EQ(targets.size(), 1u);
  EXPECT_EQ(targets[0].rank, 4);
  EXPECT_EQ(targets[0].out, 6);
  const Factors f = pack(targets[0], 2.0);
  const at::Tensor A = f.A.view({3, 4, 4}), B = f.B.view({6, 4, 3});
  for (int64_t e = 0; e < 3; ++e)
    for (int64_t o = 0; o < 6; ++o)
      for (int64_t k = 0; k < 4; ++k) {
        const bool same_half = (o < 3) == (k < 2);
        EXPECT_EQ(B[o][k][e].item<float>(), same_half ? -float(100 * e + 10 * (o % 3) + k % 2 + 1) : 0.0f);
        EXPECT_EQ(A[e][k][0].item<float>(), float(100 * e + 10 * (k % 2) + 1));
      }
}

TEST(PeftLayout, OnlyUpFillsTheLowerHalf) {
  const auto lora = make_lora(small_spec(), {"up"}, {0});
  number(*lora);
  const Factors f = pack(collect_targets(small_spec(), {lora})[0], 2.0);
  EXPECT_EQ(f.A.size(0), 6);  // no rank is spent on gate
  EXPECT_TRUE(f.B.narrow(0, 0, 3).eq(0).all().item<bool>());
  EXPECT_TRUE(f.B.narrow(0, 3, 3).ne(0).all().item<bool>());
}

TEST(PeftLayout, KeysNestWhenBothExpertWeightsAreTargeted) {
  const auto one = collect_targets(small_spec(), {make_lora(small_spec(), {"gate"})});
  EXPECT_EQ(tensor_key(one[0], one, "lora_A"), "base_model.model.model.layers.0.mlp.experts.lora_A.weight");
  const auto both = collect_targets(small_spec(), {make_lora(small_spec(), {"down", "up", "q"})});
  ASSERT_EQ(both.size(), 6u);
  EXPECT_EQ(tensor_key(both[0], both, "lora_A"), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
  EXPECT_EQ(tensor_key(both[1], both, "lora_B"),
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight");
  EXPECT_EQ(tensor_key(both[2], both, "lora_A"), "base_model.model.model.layers.0.mlp.experts.lora_A.weight");
}

TEST(PeftLayout, ScalesOfSeveralAdaptersAreFolded) {
  const auto a = make_lora(small_spec(), {"q"}, {0}, 4),
             b = make_lora(small_spec(), {"q"}, {0}, 1);  // scales 2 and 0.5
  number(*a);
  number(*b);
  const auto targets = collect_targets(small_spec(), {a, b});
  ASSERT_EQ(targets.size(), 1u);
  EXPECT_EQ(targets[0].rank, 4);
  EXPECT_EQ(common_scale(targets), 2.0);
  const Factors f = pack(targets[0], 2.0);
  EXPECT_EQ(f.B[0][0].item<float>(), -1.0f);
  EXPECT_EQ(f.B[0][2].item<float>(), -0.25f);
  EXPECT_EQ(f.A[2][1].item<float>(), 2.0f);
}

TEST(PeftLayout, AnUnknownFamilyIsRefused) {
  auto spec = small_spec();
  spec.family = "gpt_oss";
  EXPECT_THROW(collect_targets(spec, {make_lora(spec, {"down"})}), UserError);
}

// A run with large random factors on `sites`; opened on the CPU in float32.
struct Case {
  std::string name;
  TinyWorld world;
};

Case make_case(const TinyWorld& base, const std::string& name,
               const std::function<void(run::RunConfig&)>& change = {}) {
  Case c{name, base};
  c.world.run = base.dir / ("run-" + name);
  c.world.config.run.dir = c.world.run.string();
  if (change) change(c.world.config);
  testing::write_run(c.world, 0.3);
  return c;
}

graft::GraftedModel open(const TinyWorld& world) {
  graft::OpenOptions options;
  options.dtype = at::kFloat, options.device = config::Device::cpu, options.with_codecs = false;
  return graft::open_model(world.run, options);
}

// Text and new ids, mixed at random.
at::Tensor make_ids(const graft::GraftedModel& m) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  const at::Tensor text = at::randint(0, m.vocabulary.text_size, {2, 12}, generator, at::kLong),
                   grafted = at::randint(m.vocabulary.text_size, m.vocabulary.size(), {2, 12}, generator, at::kLong);
  at::Tensor ids = at::cat({text.narrow(1, 0, 6), grafted, text.narrow(1, 6, 6)}, 1);
  ids[0][6] = m.vocabulary.modalities[0].begin_id();
  ids[0][17] = m.vocabulary.modalities[0].end_id();
  return ids.contiguous();
}

at::Tensor ungated_logits(const graft::GraftedModel& m, const at::Tensor& ids_BS) {
  const at::NoGradGuard no_grad;
  model::ForwardOptions options;
  options.gate = model::Gate::all;
  return m.decoder->all_logits(m.decoder->forward(model::pack_rows(ids_BS), options).hidden_TD)
      .view({ids_BS.size(0), ids_BS.size(1), -1})
      .clone();
}

void set_adapter(run::RunConfig& c, std::vector<std::string> sites, std::vector<int64_t> layers = {}) {
  c.adapters[0].sites = std::move(sites);
  c.adapters[0].layers = std::move(layers);
}

TEST(Peft, TransformersAndPeftGiveTheRunsLogits) {
  const std::string python = testing::reference_python(test_source_dir(), "peft, transformers, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers and PEFT (third_party/requirements-tests.txt)";
  const TemporaryFolder folder("peft");
  const TinyWorld qwen = testing::make_tiny_world(folder / "qwen", {"qwen3_moe", true, 2, 3});
  std::vector<Case> cases;
  cases.push_back(make_case(qwen, "qwen-tied"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "olmoe", {"olmoe", false, 2, 4}), "olmoe"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "mixtral", {"mixtral", false, 2, 5}), "mixtral"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "qwen2", {"qwen2_moe", false, 2, 6}), "qwen2_moe"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "dots1", {"dots1", false, 2, 10}), "dots1"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "llama", {"llama", false, 2, 7}), "llama"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "mistral", {"mistral", false, 2, 8}), "mistral"));
  cases.push_back(make_case(testing::make_tiny_world(folder / "qwen3", {"qwen3", false, 2, 9}), "qwen3-up",
                            [](auto& c) { set_adapter(c, {"up", "q", "gate"}, {1}); }));
  cases.push_back(make_case(qwen, "only-down", [](auto& c) { set_adapter(c, {"down"}); }));
  cases.push_back(make_case(qwen, "only-up", [](auto& c) { set_adapter(c, {"up"}); }));
  cases.push_back(make_case(qwen, "experts", [](auto& c) { set_adapter(c, {"gate", "up", "down"}); }));
  cases.push_back(make_case(qwen, "attention-rslora",
                            [](auto& c) { set_adapter(c, {"q", "v"}), c.adapters[0].use_rslora = true; }));
  cases.push_back(make_case(
      qwen, "vera", [](auto& c) { c.adapters[0].kind = adapters::AdapterKind::vera, c.adapters[0].rank = 12; }));
  cases.push_back(make_case(qwen, "one-layer", [](auto& c) { set_adapter(c, {"gate", "down", "o"}, {1}); }));
  cases.push_back(make_case(qwen, "two-adapters", [](auto& c) {
    c.adapters.push_back(c.adapters[0]);
    c.adapters[1].rank = 3, c.adapters[1].alpha = 2;
    c.adapters[1].sites = {"down", "q"}, c.adapters[1].layers = {0};
  }));
  Json list = Json::array();
  for (const Case& c : cases) {
    const graft::GraftedModel m = open(c.world);
    PeftOptions options;
    options.output = folder / ("peft-" + c.name);
    const PeftReport report = export_peft(m, options);
    EXPECT_LE(report.relative_error, c.name == "two-adapters" ? 1e-7 : kExact) << c.name;
    EXPECT_EQ(report.silent_experts, 0) << c.name;
    EXPECT_EQ(report.new_rows, 18) << c.name;
    const at::Tensor ids = make_ids(m);
    io::save_safetensors(options.output.string() + ".ids", {{"input_ids", ids}});
    io::save_safetensors(options.output.string() + ".logits", {{"logits", ungated_logits(m, ids)}});
    list.push_back({{"name", c.name},
                    {"base", c.world.base.string()},
                    {"export", options.output.string()},
                    {"ids", options.output.string() + ".ids"},
                    {"logits", options.output.string() + ".logits"},
                    {"vocab_size", m.vocabulary.size()}});
  }
  // The control: experts in reverse order must be seen.
  fs::copy(folder / "peft-experts", folder / "peft-scrambled");
  io::TensorMap tensors;
  for (const auto& [name, t] : io::load_safetensors(folder / "peft-experts/adapter_model.safetensors"))
    tensors[name] = name.ends_with("experts.lora_B.weight")
                        ? t.view({t.size(0), -1, 4}).flip(2).reshape(t.sizes()).contiguous()
                        : t.clone();
  io::save_safetensors(folder / "peft-scrambled/adapter_model.safetensors", tensors, {{"format", "pt"}});
  for (const Json& entry : Json(list))
    if (entry["name"] == "experts") {
      Json scrambled = entry;
      scrambled["name"] = "scrambled", scrambled["export"] = (folder / "peft-scrambled").string();
      list.push_back(scrambled);
    }
  io::write_json(folder / "cases.json", list);
  testing::Process process({python, test_source_dir() + "/tests/exporting/check_peft.py",
                            (folder / "cases.json").string(), (folder / "results.json").string()},
                           {"OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "CUDA_VISIBLE_DEVICES="});
  const testing::ProcessResult done = process.wait();
  ASSERT_EQ(done.code, 0) << done.err;
  const Json results = io::read_json(folder / "results.json");
  ASSERT_EQ(results.size(), list.size());
  for (const auto& [name, r] : results.items()) {
    RecordProperty(name, r.dump());
    if (name == "scrambled") {
      EXPECT_GT(r["max_abs"].get<double>(), 0.1);
      continue;
    }
    EXPECT_LE(r["max_abs"].get<double>(), 1e-4) << name << " " << r.dump();
    EXPECT_GT(r["off"].get<double>(), 0.1) << name << ": the adapter does something";
    // Other matrix sizes after resizing may round differently, no more.
    EXPECT_LE(r["text_off"].get<double>(), 1e-5) << name;
    for (const auto& w : r["warnings"]) {
      const std::string text = w;
      EXPECT_TRUE(text.find("moegraft_gate") != std::string::npos ||
                  (text.find("_pattern keys did not match") != std::string::npos &&
                   (name == "experts" || name == "two-adapters")))
          << name << ": " << text;
    }
  }
}

class Export : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder("peft");
    world_ = new TinyWorld(make_case(testing::make_tiny_world(*folder_ / "world"), "all").world);
  }
  static void TearDownTestSuite() {
    delete world_;
    delete folder_;
  }
  PeftOptions to(const std::string& name) const {
    PeftOptions o;
    o.output = *folder_ / name;
    return o;
  }
  static TemporaryFolder* folder_;
  static TinyWorld* world_;
};
TemporaryFolder* Export::folder_ = nullptr;
TinyWorld* Export::world_ = nullptr;

TEST_F(Export, WritesConfigMarkerVocabularyAndReadme) {
  const graft::GraftedModel m = open(*world_);
  PeftOptions options = to("files");
  options.base_name = "someone/base";
  const PeftReport report = export_peft(m, options);
  const Json config = io::read_json(options.output / "adapter_config.json");
  EXPECT_EQ(config["base_model_name_or_path"], "someone/base");
  EXPECT_EQ(config["r"], 8);  // gate and up, rank 4 each
  EXPECT_EQ(config["lora_alpha"], 16);
  EXPECT_EQ(config["target_modules"], (Json{"k_proj", "o_proj", "q_proj", "v_proj"}));
  EXPECT_EQ(config["target_parameters"], (Json{"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}));
  EXPECT_EQ(config["rank_pattern"].size(), 1u);
  EXPECT_EQ(config["rank_pattern"].begin().value(), 4);
  EXPECT_EQ(config["alpha_pattern"].begin().value(), 8);
  EXPECT_EQ(config["trainable_token_indices"]["embed_tokens"].size(), 18u);
  EXPECT_EQ(config["trainable_token_indices"]["lm_head"][0], m.vocabulary.text_size);
  EXPECT_EQ(config["moegraft_gate"]["gate"], "modality");
  const Json marker = io::read_json(options.output / "moegraft.json");
  EXPECT_EQ(marker["gate"], "modality");
  EXPECT_EQ(marker["modalities"][0]["begin_id"], m.vocabulary.text_size);
  EXPECT_EQ(marker["modalities"][0]["first_code_id"], m.vocabulary.text_size + 2);
  EXPECT_EQ(marker["terms"].size(), 2u * 7u);
  EXPECT_TRUE(fs::exists(options.output / "vocabulary.json"));
  const std::string readme = io::read_file(options.output / "README.md");
  EXPECT_NE(readme.find("resize_token_embeddings(" + std::to_string(m.vocabulary.size())), std::string::npos);
  EXPECT_NE(readme.find("someone/base"), std::string::npos);
  EXPECT_EQ(io::SafetensorsFile(options.output / "adapter_model.safetensors").metadata().at("format"), "pt");
  EXPECT_EQ(report.experts, 2 * 2 * 4);
  EXPECT_EQ(report.tensors, 2 * 6 * 2 + 2);
  for (const auto& t : report.targets)
    for (const int64_t n : t.nonzero) EXPECT_GT(n, 0) << t.path;
  for (const auto& entry : fs::directory_iterator(folder_->path()))
    EXPECT_EQ(entry.path().filename().string().find(".part"), std::string::npos) << entry.path();
}

TEST_F(Export, VerificationSeesDamage) {
  const graft::GraftedModel m = open(*world_);
  const PeftOptions options = to("damage");
  export_peft(m, options);
  const fs::path weights = options.output / "adapter_model.safetensors", json = options.output / "adapter_config.json";
  io::TensorMap good;
  for (const auto& [name, t] : io::load_safetensors(weights)) good[name] = t.clone();
  const auto refuses = [&](const char* what, const std::function<void(io::TensorMap&)>& damage) {
    io::TensorMap bad;
    for (const auto& [name, t] : good) bad[name] = t.clone();
    damage(bad);
    io::save_safetensors(weights, bad, {{"format", "pt"}});
    EXPECT_THROW(verify_peft(m, options.output), UserError) << what;
    io::save_safetensors(weights, good, {{"format", "pt"}});
    EXPECT_NO_THROW(verify_peft(m, options.output)) << what;
  };
  const std::string experts = "base_model.model.model.layers.1.mlp.experts.";
  refuses("grouped by expert", [&](io::TensorMap& t) {
    at::Tensor& B = t.at(experts + "lora_B.weight");
    B = B.view({B.size(0), -1, 4}).transpose(1, 2).reshape(B.sizes()).contiguous();
  });
  refuses("one expert dropped",
          [&](io::TensorMap& t) { t.at(experts + "base_layer.lora_A.weight").narrow(0, 8, 8).zero_(); });
  refuses("one element off", [&](io::TensorMap& t) { t.at(experts + "lora_A.weight")[3][2].add_(1e-3); });
  refuses("missing tensor", [&](io::TensorMap& t) { t.erase(experts + "lora_A.weight"); });
  refuses("superfluous tensor", [&](io::TensorMap& t) { t["extra"] = at::zeros({1}); });
  refuses("wrong shape", [&](io::TensorMap& t) { t.at(experts + "lora_A.weight") = at::zeros({3, 3}); });
  refuses("not a number", [&](io::TensorMap& t) {
    t.at("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")[0][0].fill_(NAN);
  });
  refuses("a row", [&](io::TensorMap& t) {
    t.at("base_model.model.lm_head.token_adapter.trainable_tokens_delta")[17][0].add_(1);
  });
  const Json config = io::read_json(json);
  const std::vector<std::pair<std::string, Json>> edits = {{"lora_alpha", 17},
                                                           {"rank_pattern", Json::object()},
                                                           {"target_parameters", Json::array()},
                                                           {"use_rslora", true},
                                                           {"r", "x"}};
  for (const auto& [key, value] : edits) {
    Json bad = config;
    bad[key] = value;
    io::write_json(json, bad);
    EXPECT_THROW(verify_peft(m, options.output), UserError) << key;
  }
}

TEST_F(Export, ANaNInTheRunLeavesNothingBehind) {
  const graft::GraftedModel m = open(*world_);
  {
    const at::NoGradGuard no_grad;
    m.adapters->adapters()[0]->factors()[0].B.view(-1)[0].fill_(NAN);
  }
  EXPECT_THROW(export_peft(m, to("nan")), UserError);
  EXPECT_FALSE(fs::exists(to("nan").output));
  for (const auto& entry : fs::directory_iterator(folder_->path()))
    EXPECT_EQ(entry.path().filename().string().find(".part"), std::string::npos) << entry.path();
}

TEST_F(Export, SilentExpertsAreCounted) {
  const graft::GraftedModel m = open(*world_);
  {
    const at::NoGradGuard no_grad;
    for (auto& f : m.adapters->adapters()[0]->factors())
      if (f.layer == 1 && f.site == model::Site::down) f.B[2].zero_();
  }
  const PeftReport report = export_peft(m, to("silent"));
  EXPECT_EQ(report.silent_experts, 1);
  EXPECT_EQ(report.targets.back().silent_experts, (std::vector<int64_t>{2}));
  EXPECT_EQ(Json::parse(report.to_json())["silent_experts"], 1);
}

// RLIMIT_FSIZE stands for a full disk.
TEST_F(Export, ABrokenWriteKeepsTheEarlierExport) {
  const graft::GraftedModel m = open(*world_);
  PeftOptions options = to("kept");
  export_peft(m, options);
  const std::string before = io::read_file(options.output / "adapter_model.safetensors");
  options.overwrite = true;
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight{4096, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &tight);
  std::string error;
  try {
    export_peft(m, options);
  } catch (const UserError& e) { error = e.what(); }
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_FALSE(error.empty());
  EXPECT_EQ(io::read_file(options.output / "adapter_model.safetensors"), before);
  for (const auto& entry : fs::directory_iterator(folder_->path()))
    EXPECT_EQ(entry.path().filename().string().find(".part"), std::string::npos) << entry.path();
  EXPECT_NO_THROW(export_peft(m, options));
}

TEST_F(Export, RefusesWhatItMustNotReplace) {
  const graft::GraftedModel m = open(*world_);
  PeftOptions options = to("taken");
  export_peft(m, options);
  EXPECT_THROW(export_peft(m, options), UsageError);
  fs::create_directories(*folder_ / "mine");
  PeftOptions mine = to("mine");
  mine.overwrite = true;
  EXPECT_THROW(export_peft(m, mine), UsageError);
  options.overwrite = true;
  export_peft(m, options);
  io::write_file_atomic(options.output / "notes.txt", "mine");
  EXPECT_THROW(export_peft(m, options), UsageError) << "a file beside the earlier export's";
  EXPECT_TRUE(fs::exists(options.output / "notes.txt"));
  EXPECT_THROW(export_peft(m, to("no/such/parent")), UsageError);
  graft::OpenOptions open_options;
  open_options.device = config::Device::cpu;
  const graft::GraftedModel plain = graft::open_model(world_->base, open_options);
  EXPECT_THROW(export_peft(plain, to("plain")), UsageError);
}

TEST_F(Export, CommandLine) {
  if (testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  const std::string run = world_->run.string(), out = (*folder_ / "cli").string();
  const auto done = testing::run_moegraft({"export", run, "-o", out, "--json"});
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_LE(Json::parse(done.out)["relative_error"].get<double>(), kExact);
  // What the export is compared with is what `moegraft logits --gate all` prints.
  const graft::GraftedModel m = open(*world_);
  const at::Tensor ids = make_ids(m);
  io::save_safetensors(out + ".ids", {{"input_ids", ids}});
  ASSERT_EQ(testing::run_moegraft({"logits", run, "--ids", out + ".ids", "-o", out + ".logits", "--gate", "all"}).code,
            0);
  EXPECT_LE((io::SafetensorsFile(out + ".logits").tensor("logits") - ungated_logits(m, ids)).abs().max().item<float>(),
            1e-5f);  // threads may split sums elsewhere
  EXPECT_EQ(testing::run_moegraft({"export", run, "-o", out}).code, 2);
  EXPECT_EQ(testing::run_moegraft({"export", run, "-o", out, "--overwrite"}).code, 0);
  const auto later = testing::run_moegraft({"export", run, "-o", out + "2", "--format", "hf-merged"});
  EXPECT_EQ(later.code, 2);
  EXPECT_NE(later.err.find("formats: peft"), std::string::npos) << later.err;
  EXPECT_EQ(testing::run_moegraft({"export", world_->base.string(), "-o", out + "2"}).code, 2);
  EXPECT_EQ(testing::run_moegraft({"export", run, "-o", out + "2", "--checkpoint", "77"}).code, 1);
}

}  // namespace
}  // namespace moegraft::exporting
