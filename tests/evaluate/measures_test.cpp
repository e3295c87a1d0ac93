#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/codec/codec.h"
#include "moegraft/data/shard.h"
#include "moegraft/data/stream.h"
#include "moegraft/evaluate/captions.h"
#include "moegraft/evaluate/evaluation.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/evaluate/retrieval.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"
#include "moegraft/model/weights.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::evaluate {
namespace {

namespace fs = std::filesystem;

template <class E = UserError, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) { return e.what(); } catch (const std::exception& e) {
    return std::string("another kind of error: ") + e.what();
  }
  return "no error";
}

class Measures : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new testing::TemporaryFolder("moegraft-evaluate");
    world_ = new testing::TinyWorld(testing::make_tiny_world(folder_->path() / "world"));
    testing::write_run(*world_, 0.5);
  }
  static void TearDownTestSuite() {
    delete world_;
    delete folder_;
  }
  static std::string text_of(const fs::path& path) { return path.string(); }

  // A graft whose heads are all zero: every next token is equally likely.
  static graft::GraftedModel uniform() {
    const at::NoGradGuard no_grad;
    graft::GraftedModel m;
    m.tokenizer = tokenizer::load_tokenizer(world_->tokenizer);
    m.codecs["image"] = codec::load_codec(world_->codec);
    model::BaseModel base = model::init_base(model::read_spec(world_->base), {1.0, 1});
    base.weights->head_VD().tensor().zero_();
    const int64_t V = base.spec.vocab_size, D = base.spec.hidden_size;
    m.vocabulary = {V, base.spec.bos_id, base.spec.eos_id, {{"image", 1, V, 16, 4}}};
    m.decoder = std::make_unique<model::Decoder>(std::move(base));
    m.decoder->attach_rows({1, V, at::ones({18, D}), at::zeros({18, D})});
    return m;
  }

  static testing::TemporaryFolder* folder_;
  static testing::TinyWorld* world_;
};
testing::TemporaryFolder* Measures::folder_ = nullptr;
testing::TinyWorld* Measures::world_ = nullptr;

TEST_F(Measures, AUniformModelHasTheLogOfItsVocabulary) {
  const graft::GraftedModel m = uniform();
  data::EvalStream stream({{text_of(world_->text_shards), 1.0}, {text_of(world_->image_shards), 1.0}},
                          world_->config.data, m.vocabulary);
  const Likelihood l = measure_likelihood(m, stream);
  EXPECT_NEAR(l.nll_M[0], std::log(double(m.vocabulary.text_size)), 1e-5);
  EXPECT_NEAR(l.nll_M[1], std::log(18.0), 1e-5);
  EXPECT_EQ(l.labels_M[1], 16 * 5);  // 16 pictures of 4 codes and an end
  const auto& tokens = m.vocabulary.modalities[0];
  const auto items = read_captioned_items(text_of(world_->image_shards), m.vocabulary, tokens, 100);
  const CaptionUse use = measure_captions(m, tokens, items, world_->config.data, 3);
  EXPECT_EQ(use.items, 16);
  EXPECT_EQ(use.labels, 80);
  for (const double nll : {use.nll_true, use.nll_empty, use.nll_shuffled}) EXPECT_NEAR(nll, std::log(18.0), 1e-5);
  EXPECT_NEAR(use.prompt_used(), 0, 1e-6);
}

// A set of two modalities: pictures, and a sequence of two positions with a code of each of two codebooks. Labels are
// normalised over all rows of their modality.
TEST_F(Measures, TwoModalitiesOfOneSet) {
  const at::NoGradGuard no_grad;
  graft::GraftedModel m = uniform();
  const int64_t V = m.vocabulary.text_size, sound = V + 18;
  m.vocabulary.modalities.push_back({"sound", 2, sound, 6, 4, 2});
  m.decoder->attach_rows(
      {2, sound, at::ones({8, m.decoder->spec().hidden_size}), at::zeros({8, m.decoder->spec().hidden_size})});
  const testing::TemporaryFolder folder;
  data::ShardWriter writer(folder / "shards",
                           {{{"text", 10, 0}, {"image", 16, 4, 1, {2, 2}}, {"sound", 6, 4, 2, {2}}}});
  const std::vector<int32_t> red{3}, low{4, 5}, picture{0, 15, 2, 3}, a{0, 3, 2, 5}, b{1, 3, 2, 4};
  writer.add({{0, red}, {1, picture}});
  writer.add({{0, red}, {2, a}});
  writer.add({{2, b}, {0, low}});
  writer.add({{0, red}, {1, picture}, {2, b}});
  writer.finish();
  const std::string path = text_of(folder / "shards");
  data::EvalStream stream({{path, 1.0}}, world_->config.data, m.vocabulary);
  const Likelihood l = measure_likelihood(m, stream);
  EXPECT_EQ(l.labels_M, (std::vector<int64_t>{0, 2 * 5, 3 * 5}));
  EXPECT_NEAR(l.nll_M[1], std::log(18.0), 1e-5);
  EXPECT_NEAR(l.nll_M[2], std::log(8.0), 1e-5);
  const auto& tokens = m.vocabulary.by_name("sound");
  const auto items = read_captioned_items(path, m.vocabulary, tokens, 10);
  ASSERT_EQ(items.size(), 2u) << "a document with an item of each is not a captioned one";
  EXPECT_EQ(items[0].codes, a);
  EXPECT_EQ(items[1].after, low);
  EXPECT_NEAR(measure_captions(m, tokens, items, world_->config.data, 3).nll_true, std::log(8.0), 1e-5);
  EXPECT_EQ(count_codes({path}, m.vocabulary, tokens).counts, (std::vector<int64_t>{1, 2, 3, 3, 2, 1, 3}));
  const auto sequence = data::assemble({{2, a}}, m.vocabulary, world_->config.data);
  EXPECT_NEAR(sequence_nll(m, tokens, {sequence})[0], 5 * std::log(8.0), 1e-4);
}

TEST_F(Measures, CaptionsAgreeWithTheStreamAndShufflingChangesThem) {
  const auto m = graft::open_model(world_->run);
  const auto& tokens = m.vocabulary.modalities[0];
  data::EvalStream stream({{text_of(world_->image_shards), 1.0}}, world_->config.data, m.vocabulary);
  const Likelihood l = measure_likelihood(m, stream);
  const auto items = read_captioned_items(text_of(world_->image_shards), m.vocabulary, tokens, 100);
  const CaptionUse use = measure_captions(m, tokens, items, world_->config.data, 3);
  EXPECT_NEAR(use.nll_true, l.nll_M[1], 1e-5);
  EXPECT_NE(use.nll_empty, use.nll_true);
  EXPECT_NE(use.nll_shuffled, use.nll_true);
}

TEST_F(Measures, ItemsAreSpreadOverTheShards) {
  const auto m = uniform();
  const auto& tokens = m.vocabulary.modalities[0];
  const auto all = read_captioned_items(text_of(world_->image_shards), m.vocabulary, tokens, 100),
             some = read_captioned_items(text_of(world_->image_shards), m.vocabulary, tokens, 4);
  ASSERT_EQ(all.size(), 16u);
  ASSERT_EQ(some.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(some[i].before, all[4 * i].before);
  EXPECT_NE(message_of([&] {
              read_captioned_items(text_of(world_->text_shards), m.vocabulary, tokens, 4);
            }).find("holds no document with a caption"),
            std::string::npos);
}

TEST(Captions, EachIsBorrowedFromAnotherPicture) {
  std::vector<CaptionedItem> items;
  for (int32_t i = 0; i < 20; ++i)
    items.push_back({{i / 2}, {i / 4, 1}, {}});  // captions come in pairs, pictures in fours
  const auto lender = borrow_captions(items, 7);
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& other = items[size_t(lender[i])];
    EXPECT_NE(other.before, items[i].before);
    EXPECT_NE(other.codes, items[i].codes);
  }
  EXPECT_EQ(lender, borrow_captions(items, 7));
  EXPECT_NE(lender, borrow_captions(items, 8));
  EXPECT_NE(message_of([&] { borrow_captions({items[0], items[1]}, 7); }).find("alike"), std::string::npos);
  EXPECT_NE(message_of([&] { borrow_captions({items[0]}, 7); }).find("alike"), std::string::npos);
}

TEST(Captions, UnigramOnKnownCounts) {
  const testing::TemporaryFolder folder;
  data::ShardWriter writer(folder / "shards", {{{"text", 10, 0}, {"image", 4, 4}}});
  const std::vector<int32_t> caption{3}, a{0, 0, 1, 2}, b{0, 0, 0, 0};
  writer.add({{0, caption}, {1, a}});
  writer.add({{1, b}, {0, caption}});
  writer.add({{0, caption}});
  writer.finish();
  const model::ModalityTokens tokens{"image", 1, 10, 4, 4};
  const model::Vocabulary vocabulary{10, -1, -1, {tokens}};
  const Unigram u = count_codes({(folder / "shards").string()}, vocabulary, tokens);
  EXPECT_EQ(u.counts, (std::vector<int64_t>{6, 1, 1, 0, 2}));
  // With one added: 7, 2, 2, 1, 3 of 15.
  EXPECT_DOUBLE_EQ(u.nll(int64_t{0}), std::log(15.0 / 7));
  EXPECT_DOUBLE_EQ(u.nll(int64_t{3}), std::log(15.0));
  EXPECT_DOUBLE_EQ(u.nll({{{}, {0, 1, 3, 3}, {}}}),
                   (std::log(15.0 / 7) + std::log(15.0 / 2) + 2 * std::log(15.0) + std::log(5.0)) / 5);
  const auto items = read_captioned_items((folder / "shards").string(), vocabulary, tokens, 10);
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[0].before, caption);
  EXPECT_EQ(items[1].after, caption);
}

TEST(Retrieval, RanksOnPicturesWhereTheAnswerIsKnown) {
  // Candidate m is the constant m / 8; the fourth and fifth are the same picture.
  at::Tensor candidates = at::zeros({6, 3, 2, 2});
  for (int64_t m = 0; m < 6; ++m) candidates[m].fill_(double(m == 4 ? 3 : m) / 8);
  at::Tensor samples = at::zeros({5, 3, 2, 2});
  const double values[] = {0.0, 0.26, 0.375, 1.0, 0.1875};
  for (int64_t n = 0; n < 5; ++n) samples[n].fill_(values[n]);
  // 0.26 is nearest to 2/8; 0.375 is 3 and its twin; 1.0 is furthest from 0; 0.1875 lies in the middle of 1/8 and 2/8:
  // a tie counts against.
  const Ranking r = rank_pictures(samples, candidates, {0, 1, 4, 0, 2});
  EXPECT_EQ(r.rank_N, (std::vector<int64_t>{1, 4, 1, 6, 2}));
  EXPECT_EQ(r.nearest_N, (std::vector<int64_t>{0, 2, 3, 5, 1}));
  EXPECT_DOUBLE_EQ(r.top(1), 0.4);
  EXPECT_DOUBLE_EQ(r.top(4), 0.8);
  EXPECT_DOUBLE_EQ(r.mean_rank(), 14.0 / 5);
  EXPECT_EQ(rank_pictures(at::full({1, 3, 2, 2}, NAN), candidates, {0}).rank_N[0], 6);
}

TEST_F(Measures, RetrievalFindsThePictureThatTheModelDraws) {
  const auto m = uniform();  // greedy on equal logits: code 0 everywhere, whatever the prompt
  const fs::path dir = folder_->path() / "gallery";
  fs::create_directories(dir);
  io::save_image(dir / "zero.png", graft::find_image_codec(m, "image")->decode(at::zeros({1, 4}, at::kLong))[0]);
  std::string manifest = io::Json{{"image", "zero.png"}, {"text", "zero"}}.dump() + "\n";
  io::write_file_atomic(dir / "broken.png", "not a picture");
  manifest += io::Json{{"image", "broken.png"}, {"text", "broken"}}.dump() + "\n";
  for (const char* name : {"red-disc", "blue-bar"})
    manifest +=
        io::Json{{"image", (world_->dir / "images" / (std::string(name) + ".png")).string()}, {"text", name}}.dump() +
        "\n";
  io::write_file_atomic(dir / "m.jsonl", manifest);
  RetrievalSection options;
  options.name = "gallery", options.manifest = text_of(dir / "m.jsonl"), options.sheet = text_of(dir / "sheet.png");
  const auto& tokens = m.vocabulary.modalities[0];
  const auto r = measure_retrieval(m, tokens, options);
  EXPECT_EQ(r.items.size(), 3u);
  EXPECT_EQ(r.candidates, 3);
  EXPECT_EQ(r.skipped, 1);
  for (const auto& item : r.items) {
    EXPECT_EQ(fs::path(item.nearest).filename(), "zero.png") << item.caption;
    EXPECT_EQ(item.rank == 1, item.caption == "zero") << item.caption;
  }
  EXPECT_NEAR(r.real.top(1), 1.0 / 3, 1e-12);
  EXPECT_EQ(r.real.top(10), 1.0);
  EXPECT_EQ(io::load_image(dir / "sheet.png").size(2), 6 * 12 + 7 * 2);  // three pairs of 12 pixels, border 2

  options.candidates = text_of(world_->manifest);
  options.n = 1;
  const auto more = measure_retrieval(m, tokens, options);
  EXPECT_EQ(more.items.size(), 1u);
  EXPECT_EQ(more.candidates, 1 + 16);  // red-disc and blue-bar are among the 16
  options.manifest = text_of(dir / "absent.jsonl");
  EXPECT_NE(message_of([&] { measure_retrieval(m, tokens, options); }).find("absent.jsonl"), std::string::npos);
}

// Every pixel comes back darker by a quarter; the codes alternate.
class DarkCodec : public codec::ImageCodec {
 public:
  std::string architecture() const override { return "dark"; }
  int64_t image_size() const override { return 4; }
  codec::CodeShape shape() const override { return {{2, 2}}; }
  int64_t codebook_size() const override { return 8; }
  at::Tensor codebook_NZ() const override { return at::zeros({8, 1}); }
  at::Tensor encode(const at::Tensor& x) const override {
    return at::arange(4, at::kLong).remainder(2).expand({x.size(0), 4});
  }
  at::Tensor decode(const at::Tensor& ids) const override { return at::full({ids.size(0), 3, 4, 4}, 0.75); }
  void to(at::Device) override {}
};

TEST_F(Measures, CodecQualityOfAKnownError) {
  const fs::path dir = folder_->path() / "white";
  fs::create_directories(dir);
  for (const char* name : {"a.png", "b.png", "c.png"}) io::save_image(dir / name, at::full({3, 4, 4}, 255, at::kByte));
  graft::GraftedModel m = uniform();
  m.codecs["image"] = std::make_shared<DarkCodec>();
  const codec::Quality q = measure_codec(m, m.vocabulary.modalities[0], {"white", text_of(dir), 2});
  EXPECT_EQ(q.pictures, 2);
  EXPECT_NEAR(q.psnr, -20 * std::log10(0.25), 1e-5);
  EXPECT_NEAR(q.l1, 0.25, 1e-7);
  EXPECT_EQ(q.used_codes, 2);
  EXPECT_NEAR(q.perplexity, 2, 1e-12);
}

EvalConfig everything(const testing::TinyWorld& world) {
  return config::parse<EvalConfig>(config::Document::from_string("text: { shards: [" + world.text_shards.string() +
                                                                 "] }\n"
                                                                 "images: [{ name: all, shards: " +
                                                                 world.image_shards.string() +
                                                                 " }]\n"
                                                                 "codec: [{ name: all, pictures: " +
                                                                 world.manifest.string() +
                                                                 " }]\n"
                                                                 "retrieval: [{ name: all, manifest: " +
                                                                 world.manifest.string() +
                                                                 ", n: 5 }]\n"
                                                                 "drift: {}\nrouting: { max_tokens: 512 }\n"));
}

TEST_F(Measures, TheWholeEvaluationOfARun) {
  std::string table;
  const auto j = io::Json::parse(
      evaluate_model(world_->run, everything(*world_), {{}, [&](const std::string& rows) { table += rows; }}));
  EXPECT_TRUE(j["text"]["equal_bits"].get<bool>());
  for (const char* dtype : {"float32", "bfloat16"}) EXPECT_TRUE(j["drift"][dtype]["exact"].get<bool>()) << dtype;
  EXPECT_TRUE(j["images"]["all"].contains("unigram"));
  EXPECT_EQ(j["codec"]["all"]["pictures"], 16);
  EXPECT_EQ(j["retrieval"]["all"]["items"].size(), 5u);
  EXPECT_GE(j["routing"]["now"]["divergence_bits"]["image"].get<double>(), 0);
  // Step 0 is the checkpoint itself here, so nothing moved.
  EXPECT_EQ(j["routing"]["now"], j["routing"]["start"]);
  for (const char* key : {"model", "dtype", "device", "step"}) EXPECT_TRUE(j.contains(key)) << key;
  EXPECT_EQ(j["drift"]["float32"]["max_abs"].get<double>(), 0);
  for (const char* row : {"every bit equal", "tokens, stream of 64\n", "equal to the last bit", "retrieval top-1, all",
                          "routing divergence, start"})
    EXPECT_NE(table.find(row), std::string::npos) << row << " in\n" << table;
}

TEST_F(Measures, ARunAloneIsJudgedOnItsHeldOutData) {
  const auto j = io::Json::parse(evaluate_model(world_->run, {}));
  EXPECT_TRUE(j.contains("text") && j["images"].size() == 1 && j["drift"].size() == 2);
}

// Perplexity as it is usually given, and document by document.
TEST_F(Measures, TextSaysHowItWasPacked) {
  EvalConfig config;
  config.text.emplace().shards = {text_of(world_->text_shards)};
  const auto stream = io::Json::parse(evaluate_model(world_->base, config))["text"];
  EXPECT_EQ(stream["packing"], "stream");
  EXPECT_EQ(stream["sequence_length"], 256);  // the base's positions
  config.sequence_length = 32, config.text->packing = data::Packing::documents;
  std::string table;
  const auto documents = io::Json::parse(
      evaluate_model(world_->base, config, {{}, [&](const std::string& rows) { table += rows; }}))["text"];
  EXPECT_EQ(documents["packing"], "documents");
  EXPECT_EQ(documents["sequence_length"], 32);
  EXPECT_NE(documents["nll"], stream["nll"]);
  EXPECT_NE(table.find("tokens, documents\n"), std::string::npos) << table;
}

TEST_F(Measures, BracesNameSeveralManifests) {
  const fs::path folder = world_->manifest.parent_path();
  for (const char* name : {"part-0.jsonl", "part-1.jsonl"}) fs::copy_file(world_->manifest, folder / name);
  EvalConfig config;
  config.retrieval.emplace_back();
  config.retrieval[0].name = "r", config.retrieval[0].manifest = text_of(folder / "part-{0..1}.jsonl"),
  config.retrieval[0].n = 2;
  EXPECT_EQ(io::Json::parse(evaluate_model(world_->run, config))["retrieval"]["r"]["n"], 2);
  fs::remove(folder / "part-1.jsonl");
  EXPECT_NE(message_of([&] { evaluate_model(world_->run, config); }).find("stands for 2 files, of which"),
            std::string::npos);
  fs::remove(folder / "part-0.jsonl");
}

// Sections that a repeated call measures again, by what changed in between.
TEST_F(Measures, FinishedSectionsAreKept) {
  const fs::path output = folder_->path() / "kept" / "eval.json", shards = folder_->path() / "kept-shards";
  fs::copy(world_->image_shards, shards, fs::copy_options::recursive);
  EvalConfig config;
  config.text.emplace().shards = {text_of(world_->text_shards)};
  config.images = {{"a", text_of(shards)}, {"b", text_of(world_->image_shards)}};
  config.retrieval.emplace_back();
  config.retrieval[0].name = "r", config.retrieval[0].manifest = text_of(world_->manifest), config.retrieval[0].n = 2,
  config.retrieval[0].sheet = text_of(folder_->path() / "kept.png");
  config.unigram = {text_of(world_->image_shards)};
  const std::vector<std::string> labels{"text", "images.a", "images.b", "retrieval.r"};
  const auto place = [](io::Json& j, const std::string& label) -> io::Json& {
    const size_t dot = label.find('.');
    return dot == std::string::npos ? j[label] : j[label.substr(0, dot)][label.substr(dot + 1)];
  };
  // A result is marked before the call: what is measured again loses the mark.
  const auto measured = [&] {
    auto j = io::read_json(output);
    for (const auto& label : labels)
      if (j["sections"].contains(label)) place(j, label)["mark"] = true;
    io::write_json(output, j);
    auto after = io::Json::parse(evaluate_model(world_->run, config, {output, {}}));
    EXPECT_EQ(after, io::read_json(output));
    std::vector<std::string> again;
    for (const auto& label : labels)
      if (!place(after, label).contains("mark")) again.push_back(label);
    return again;
  };
  using Labels = std::vector<std::string>;

  // Ended after the second section, whose rows were told.
  std::string last;
  const auto stop = [&](const std::string& rows) {
    if ((last = rows).starts_with("picture NLL, a")) fail("ended here");
  };
  EXPECT_EQ(message_of([&] { evaluate_model(world_->run, config, {output, stop}); }), "ended here");
  EXPECT_EQ(io::read_json(output)["sections"].size(), 2u);
  EXPECT_EQ(measured(), (Labels{"images.b", "retrieval.r"}));
  EXPECT_EQ(measured(), Labels{});
  config.images[0].max_items = 8;
  EXPECT_EQ(measured(), Labels{"images.a"});
  fs::copy(world_->text_shards, shards, fs::copy_options::recursive | fs::copy_options::overwrite_existing);
  EXPECT_NE(message_of([&] { evaluate_model(world_->run, config, {output, {}}); }),
            "no error");  // other data of the same name: measured, not kept
  fs::copy(world_->image_shards, shards, fs::copy_options::recursive | fs::copy_options::overwrite_existing);
  EXPECT_EQ(measured(), Labels{});
  const std::string lines = io::read_file(world_->manifest);
  const fs::path picture =
      world_->manifest.parent_path() / io::Json::parse(lines.substr(0, lines.find('\n')))["image"].get<std::string>();
  fs::last_write_time(
      picture, fs::last_write_time(picture) + std::chrono::seconds(1));  // another picture behind the same manifest
  EXPECT_EQ(measured(), Labels{"retrieval.r"});
  fs::remove(config.retrieval[0].sheet);
  EXPECT_EQ(measured(), Labels{"retrieval.r"});
  // A call that asks for less leaves the rest; a JSON of another kind is no place for results.
  EvalConfig less;
  less.text = config.text;
  evaluate_model(world_->run, less, {output, {}});
  EXPECT_EQ(io::read_json(output)["sections"].size(), labels.size());
  EXPECT_EQ(measured(), Labels{});
  const fs::path foreign = folder_->path() / "foreign.json";
  io::write_json(foreign, {{"hello", 1}});
  EXPECT_NE(message_of([&] { evaluate_model(world_->run, less, {foreign, {}}); }).find("is no result of moegraft eval"),
            std::string::npos);
  EXPECT_EQ(io::read_json(foreign), (io::Json{{"hello", 1}}));
  config.sequence_length = 48;
  EXPECT_EQ(measured(), labels);
  const auto parameters = testing::read_parameters(world_->run);
  auto changed = parameters;
  changed.begin()->second = changed.begin()->second + 0.125;
  testing::replace_parameters(world_->run, changed);
  EXPECT_EQ(measured(), labels);
  testing::replace_parameters(world_->run, parameters);

  io::write_file_atomic(output, "[]");
  EXPECT_NE(
      message_of([&] { evaluate_model(world_->run, config, {output, {}}); }).find("is no result of moegraft eval"),
      std::string::npos);
  EXPECT_NE(message_of<UsageError>([&] {
              evaluate_model(world_->run, config, {output.parent_path(), {}});
            }).find("is a folder; give a file"),
            std::string::npos);
}

// A result is kept while the pictures are the same, however they are named.
TEST_F(Measures, AnotherPictureBehindAnyKindOfManifestIsMeasured) {
  const fs::path dir = folder_->path() / "behind";
  const std::string first = io::read_file(world_->manifest);
  const fs::path picture =
      world_->manifest.parent_path() / io::Json::parse(first.substr(0, first.find('\n')))["image"].get<std::string>();
  for (const char* folder : {"pics", "bare", "f", "red", "labels", "flat"}) fs::create_directories(dir / folder);
  for (const char* copy : {"pics/a.png", "pics/b.png", "bare/a", "red/a.png", "flat/a.png"})
    fs::copy_file(picture, dir / copy);
  fs::create_directory_symlink("../red", dir / "labels/red");
  io::write_file_atomic(dir / "m-0.jsonl", R"({"image": "pics/a.png", "text": "x"})");
  io::write_file_atomic(dir / "m-1.jsonl", R"({"image": "pics/b.png", "text": "x"})");
  io::write_file_atomic(dir / "f/metadata.jsonl", R"({"file_name": "../pics/a.png", "text": "x"})");
  io::write_file_atomic(dir / "bare.jsonl",
                        R"({"image": "bare/a", "text": "a text that is longer than the name of a file may be )" +
                            std::string(5000, '.') + "\"}");
  io::write_file_atomic(dir / "list.csv", "file_name,text\npics/b.png,x\n");
  for (const auto& [pictures, changed] : {std::pair("m-{0,1}.jsonl", "pics/b.png"),
                                          {"f", "pics/a.png"},
                                          {"bare.jsonl", "bare/a"},
                                          {"list.csv", "pics/b.png"},
                                          {"labels", "red/a.png"},
                                          {"flat", "flat/a.png"},
                                          {"flat/a.png", "flat/a.png"}}) {
    SCOPED_TRACE(pictures);
    EvalConfig config;
    config.codec = {{"c", text_of(dir / pictures)}};
    const fs::path output = dir / "eval.json";
    fs::remove(output);
    const auto kept = [&] {  // a mark is lost by what is measured again
      auto j = fs::exists(output) ? io::read_json(output) : io::Json::object();
      if (!j.empty()) j["codec"]["c"]["mark"] = true, io::write_json(output, j);
      return io::Json::parse(evaluate_model(world_->run, config, {output, {}}))["codec"]["c"].contains("mark");
    };
    EXPECT_FALSE(kept());
    EXPECT_TRUE(kept());
    if (std::string(pictures) == changed)
      io::write_file_atomic(dir / changed, io::read_file(dir / changed) + "x");  // itself, by its content
    else
      fs::last_write_time(dir / changed, fs::last_write_time(dir / changed) + std::chrono::seconds(1));
    EXPECT_FALSE(kept());
    EXPECT_TRUE(kept());
  }
}

TEST_F(Measures, ResultsThatWereEditedAreMeasuredAgain) {
  const fs::path output = folder_->path() / "edited.json";
  EvalConfig config;
  config.text.emplace().shards = {text_of(world_->text_shards)};
  config.codec = {{"c", text_of(world_->manifest)}};
  const std::string whole = evaluate_model(world_->run, config, {output, {}});
  const auto edited = [&](const char* at, const io::Json& value) {
    io::Json j = io::Json::parse(whole);
    j[io::Json::json_pointer(at)] = value;
    return j;
  };
  for (const auto& j : {edited("/text", 5), edited("/text/packing", 5), edited("/text", io::Json::object()),
                        edited("/codec", "none"), edited("/codec/c", io::Json::array()), edited("/sections/codec.c", 1),
                        edited("/sections/images.all", "00"), edited("/sections/images", "00")}) {
    io::write_json(output, j);
    std::string table;
    EXPECT_EQ(message_of([&] {
                evaluate_model(world_->run, config, {output, [&](const std::string& rows) { table += rows; }});
              }),
              "no error")
        << j["sections"];
    EXPECT_NE(table.find("codec PSNR, c"), std::string::npos);
    for (const char* key : {"text", "codec"})
      EXPECT_EQ(io::read_json(output)[key], io::Json::parse(whole)[key]) << j["sections"];
  }
  auto images = edited("/images", 5);
  images["sections"]["images.all"] = "00";
  io::write_json(output, images);
  config.images = {{"b", text_of(world_->image_shards)}};
  EXPECT_EQ(message_of([&] { evaluate_model(world_->run, config, {output, {}}); }), "no error");
}

TEST_F(Measures, BadInputIsRefused) {
  const auto parse = [](const std::string& yaml) {
    return message_of<UsageError>([&] { config::parse<EvalConfig>(config::Document::from_string(yaml)); });
  };
  EXPECT_NE(parse("txt: {}\n").find("text"), std::string::npos);
  EXPECT_NE(parse("images: [{ name: a, shards: x }, { name: a, shards: y }]\n").find("images[1].name must differ"),
            std::string::npos);
  EXPECT_NE(parse("drift: { dtypes: [float16] }\n").find("float16"), std::string::npos);
  EXPECT_NE(parse("routing: {}\n").find("`text` and `images`"), std::string::npos);
  EXPECT_NE(parse("text: { shards: [] }\n").find("text.shards"), std::string::npos);
  EvalConfig images;
  images.images.push_back({"a", text_of(world_->image_shards)});
  EXPECT_NE(message_of<UsageError>([&] { evaluate_model(world_->base, images); }).find("plain text model"),
            std::string::npos);
  EXPECT_NE(message_of<UsageError>([&] { evaluate_model(world_->base, {}); }).find("nothing to measure"),
            std::string::npos);
  EvalConfig missing;
  missing.text.emplace().shards = {"/nowhere/shards"};
  EXPECT_NE(message_of([&] { evaluate_model(world_->run, missing); }).find("/nowhere/shards"), std::string::npos);
  missing.checkpoint = "77";
  EXPECT_NE(message_of([&] { evaluate_model(world_->run, missing); }).find("77"), std::string::npos);
}

TEST_F(Measures, TheCommandPrintsATableOrOneObject) {
  if (testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  const auto json =
      testing::run_moegraft({"eval", world_->run.string(), "--images", world_->image_shards.string(), "--retrieval",
                             world_->manifest.string(), "--ranking", world_->manifest.string(), "--n", "3", "--json"});
  ASSERT_EQ(json.code, 0) << json.err;
  const auto j = io::Json::parse(json.out);
  EXPECT_EQ(j["images"]["image"]["items"], 16);
  EXPECT_EQ(j["retrieval"]["pictures"]["n"], 3);
  EXPECT_EQ(j["ranking"]["pictures"]["n"], 3);
  EXPECT_FALSE(j.contains("text"));
  EXPECT_EQ(testing::run_moegraft({"eval", world_->run.string(), "--set", "imges=[]"}).code, 2);
  // Several shards, before the model.
  const std::string text = world_->text_shards.string(), base = world_->base.string();
  const auto two = testing::run_moegraft({"eval", "--json", "--text", text, text, base});
  ASSERT_EQ(two.code, 0) << two.err;
  EvalConfig once;
  once.text.emplace().shards = {text};
  EXPECT_EQ(io::Json::parse(two.out)["text"]["tokens"],
            2 * io::Json::parse(evaluate_model(base, once))["text"]["tokens"].get<int64_t>());
  const std::string file = text_of(folder_->path() / "command.json");
  const auto table = testing::run_moegraft({"eval", base, "--text", text, "-o", file}),
             again = testing::run_moegraft({"eval", base, "--text", text, "-o", file});
  ASSERT_EQ(table.code, 0) << table.err;
  EXPECT_EQ(table.out, again.out);
  EXPECT_NE(again.err.find("command.json holds these already, which are kept: text"), std::string::npos) << again.err;
  EXPECT_EQ(testing::run_moegraft({"eval", "/nowhere", "--drift"}).code, 1);
}

}  // namespace
}  // namespace moegraft::evaluate
