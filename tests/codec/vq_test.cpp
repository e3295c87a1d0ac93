#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include "libtorch.h"

#include <filesystem>
#include <fstream>

#include "moegraft/base/check.h"
#include "moegraft/codec/train.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"

namespace moegraft::codec {
namespace {

namespace fs = std::filesystem;

VqConfig tiny() {
  VqConfig c;
  c.image_size = 12, c.patch = 3, c.channels = {8, 16}, c.encoder_blocks = {1, 0}, c.decoder_blocks = {1, 1};
  c.mixer_blocks = 1, c.mixer_width = 24, c.codebook_size = 16, c.code_width = 4;
  return c;
}

// Discs and bars of random colours on white.
at::Tensor drawings(int64_t count, int64_t size) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
  const auto colour = at::randint(0, 200, {count, 3, 1, 1}, generator, at::kLong),
             centre = at::randint(3, size - 3, {count, 2, 1, 1}, generator, at::kLong);
  const auto axis = at::arange(size);
  const auto x = axis.view({1, 1, size}) - centre.select(1, 0), y = axis.view({1, size, 1}) - centre.select(1, 1);
  const auto inside = (x.square() + y.square() < 10).unsqueeze(1);
  return at::where(inside, colour, at::full({}, 255, at::kLong)).to(at::kByte);
}

class CodecTest : public ::testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);  // tensors this small only lose time to a second thread, minutes of it on a busy machine
    dir_ = fs::path(testing::TempDir()) /
           ("codec_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path dir_;
};

template <class E = UserError, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) { return e.what(); }
  return "nothing thrown";
}
#define EXPECT_SAYS(text, ...) \
  EXPECT_NE(message_of([&] { __VA_ARGS__; }).find(text), std::string::npos) << message_of([&] { __VA_ARGS__; })

TEST_F(CodecTest, SaveAndLoadGiveTheSameCodec) {
  VqCodec model(tiny(), 3);
  model.save(dir_);
  const auto loaded = load_codec(dir_);
  EXPECT_EQ(loaded->architecture(), "moegraft_vq");
  EXPECT_EQ(loaded->shape(), (CodeShape{{2, 2}}));
  EXPECT_EQ(loaded->item_length(), 4);
  EXPECT_EQ(loaded->num_codes(), 16);
  EXPECT_EQ(loaded->fit(), "pad");
  const auto x = to_float(drawings(5, 12));
  const auto ids = model.encode(x);
  EXPECT_EQ(ids.sizes().vec(), (std::vector<int64_t>{5, 4}));
  EXPECT_TRUE(at::equal(ids, loaded->encode(x)));
  EXPECT_TRUE(at::equal(model.decode(ids), loaded->decode(ids)));
  EXPECT_TRUE(at::equal(model.codebook_NZ(), loaded->codebook_NZ()));
}

TEST_F(CodecTest, WeightsAreAFunctionOfTheSeed) {
  const auto z = VqCodec(tiny(), 3).codebook_NZ();
  EXPECT_TRUE(at::equal(z, VqCodec(tiny(), 3).codebook_NZ()));
  EXPECT_FALSE(at::equal(z, VqCodec(tiny(), 4).codebook_NZ()));
}

TEST_F(CodecTest, IdsNameTheNearestCode) {
  VqCodec model(tiny(), 3);
  const auto z = model.embed(to_float(drawings(4, 12)));
  EXPECT_TRUE(at::allclose(z.square().mean(-1), at::ones({4, 4}), 0, 1e-4));
  const auto brute = (z.unsqueeze(2) - model.codebook_NZ()).square().sum(-1).argmin(-1);
  EXPECT_TRUE(at::equal(model.nearest(z), brute));
  // Each code is nearest to itself.
  const auto codes = model.codebook_NZ().view({4, 4, 4});
  EXPECT_TRUE(at::equal(model.nearest(codes), at::arange(16).view({4, 4})));
}

TEST_F(CodecTest, PatchesKeepTheirPlace) {
  // With patch = image_size / grid and no position mixing, a code's own cell is all it reaches beyond the 3x3
  // neighbourhoods of two convolutions.
  VqConfig c = tiny();
  c.image_size = 60, c.mixer_blocks = 0, c.channels = {8}, c.encoder_blocks = {0}, c.decoder_blocks = {0}, c.patch = 6;
  VqCodec model(c, 3);
  auto ids = at::zeros({1, 100}, at::kLong);
  const auto before = model.decode(ids).clone();
  ids[0][3 * 10 + 7] = 1;  // row 3, column 7
  const auto changed = at::nonzero((model.decode(ids) - before).abs().sum(1)[0] > 0);
  ASSERT_GT(changed.size(0), 0);
  EXPECT_GE(changed.select(1, 0).min().item<int64_t>(), 2 * 6);
  EXPECT_LT(changed.select(1, 0).max().item<int64_t>(), 5 * 6);
  EXPECT_GE(changed.select(1, 1).min().item<int64_t>(), 6 * 6);
  EXPECT_LT(changed.select(1, 1).max().item<int64_t>(), 9 * 6);
}

TEST_F(CodecTest, RefusesWrongPixelsAndIds) {
  VqCodec model(tiny(), 3);
  EXPECT_SAYS("encodes pixels [B, 3, 12, 12], got [1, 3, 10, 12]", model.encode(at::zeros({1, 3, 10, 12})));
  EXPECT_SAYS("float32 pixels", model.encode(at::zeros({1, 3, 12, 12}, at::kByte)));
  EXPECT_SAYS("code 16 is outside the codebook [0, 16)", model.decode(at::full({1, 4}, 16, at::kLong)));
  EXPECT_SAYS("code -1 is outside", model.decode(at::full({1, 4}, -1, at::kLong)));
  EXPECT_SAYS("decodes ids [B, 4], got [1, 5]", model.decode(at::zeros({1, 5}, at::kLong)));
  EXPECT_SAYS("int64 ids", model.decode(at::zeros({1, 4}, at::kFloat)));
}

TEST_F(CodecTest, RefusesBrokenFolders) {
  EXPECT_SAYS("does not exist", load_codec(dir_ / "nowhere"));
  VqCodec(tiny(), 3).save(dir_);
  const auto config = io::read_json(dir_ / "config.json");

  auto other = config;
  other["architecture"] = "moegraft_vqq";
  io::write_json(dir_ / "config.json", other);
  EXPECT_SAYS("unknown codec architecture \"moegraft_vqq\"; known: moegraft_vq (the small codec", load_codec(dir_));

  other = config;
  other["mixer_width"] = 32;
  io::write_json(dir_ / "config.json", other);
  EXPECT_SAYS("must have shape", load_codec(dir_));

  other = config;
  other.erase("patch");
  io::write_json(dir_ / "config.json", other);
  EXPECT_SAYS("\"patch\" is missing", load_codec(dir_));

  io::write_json(dir_ / "config.json", config);
  auto tensors = io::load_safetensors(dir_ / "model.safetensors");
  for (auto& [name, tensor] : tensors) tensor = tensor.clone();
  auto fewer = tensors;
  fewer.erase("decoder.out.bias");
  io::save_safetensors(dir_ / "model.safetensors", fewer);
  EXPECT_SAYS("tensor decoder.out.bias is missing", load_codec(dir_));
  auto more = tensors;
  more["decoder.extra"] = at::zeros({1});
  io::save_safetensors(dir_ / "model.safetensors", more);
  EXPECT_SAYS("unexpected tensor decoder.extra", load_codec(dir_));

  io::save_safetensors(dir_ / "model.safetensors", tensors);
  EXPECT_EQ(message_of([&] { load_codec(dir_); }), "nothing thrown");
  fs::resize_file(dir_ / "model.safetensors", fs::file_size(dir_ / "model.safetensors") / 2);
  EXPECT_SAYS("model.safetensors", load_codec(dir_));
  fs::remove(dir_ / "model.safetensors");
  EXPECT_SAYS("no weights in", load_codec(dir_));
}

TEST_F(CodecTest, NewWeightsNeverStandBesideAnotherConfig) {
  VqCodec(tiny(), 3).save(dir_);
  auto wide = tiny();
  wide.mixer_width = 32;
  // A folder in the weights' place makes their save fail after the old config went.
  fs::remove(dir_ / "model.safetensors");
  fs::create_directories(dir_ / "model.safetensors" / "in_the_way");
  EXPECT_ANY_THROW(VqCodec(wide, 3).save(dir_));
  EXPECT_FALSE(fs::exists(dir_ / "config.json"));
}

TEST_F(CodecTest, ConfigRules) {
  auto parse = [](const std::string& yaml) {
    return config::parse<CodecRunConfig>(config::Document::from_string(yaml));
  };
  const std::string base = "dir: out\ndata: { train: [{ path: x.jsonl }] }\n";
  EXPECT_EQ(parse(base).codec.grid(), 6);
  const auto says = [&](const std::string& yaml) { return message_of<UsageError>([&] { parse(yaml); }); };
  EXPECT_NE(says(base + "codec: { image_size: 35 }")
                .find("codec.image_size must be a multiple of patch * 2^(levels-1) = 6, got 35"),
            std::string::npos)
      << says(base + "codec: { image_size: 35 }");
  EXPECT_NE(says(base + "codec: { channels: [8] }").find("encoder_blocks must have one entry per level"),
            std::string::npos);
  EXPECT_NE(says(base + "train: { warm_share: 0.9 }").find("warm_share"), std::string::npos);
  EXPECT_NE(says("dir: out\ndata: { train: [] }\n").find("data.train must list at least one source"),
            std::string::npos);
  EXPECT_NE(says(base + "train: { stepz: 3 }").find("steps"), std::string::npos);
  EXPECT_NE(says(base + "train: { betas: [0.9] }").find("train.betas must have two values"), std::string::npos);
  EXPECT_NE(says(base + "train: { schedule: cosin }").find("did you mean cosine?"), std::string::npos);
  EXPECT_EQ(parse(base + "checkpoint: { every: 7 }").checkpoint.every, 7);
}

TEST_F(CodecTest, DeadCodesRestartAtEncoderOutputs) {
  auto codes = at::zeros({4, 2});
  codes[0].fill_(1), codes[1].fill_(-1), codes[2].fill_(50), codes[3].fill_(60);
  EmaCodebook book(codes, 0.5, 0.1);
  auto z = at::cat({at::full({6, 2}, 1.5), at::full({6, 2}, -2.0)});
  const auto ids = at::cat({at::zeros({6}, at::kLong), at::ones({6}, at::kLong)});
  int64_t revived = 0;
  for (uint64_t step = 0; step < 6; ++step) revived += book.update(z, ids, 7, step);
  EXPECT_EQ(revived, 2);  // counts of codes 2 and 3: 3, 1.5, …, 0.047 at the sixth step
  const auto now = book.codebook_NZ();
  for (int64_t code : {2, 3}) {
    const double value = now[code][0].item<double>();
    EXPECT_TRUE(value == 1.5 || value == -2.0) << value;
  }
  // c = sum / count: counts 3 -> 4.5, 5.25, … ; starting at 1 with weight 3·2^-k. After 6 updates the share of the old
  // centre is 3·2^-6 / (6 - 3·2^-6).
  const double old_share = 3.0 / 64 / (6 - 3.0 / 64);
  EXPECT_NEAR(now[0][0].item<double>(), 1.5 * (1 - old_share) + 1.0 * old_share, 1e-5);
}

TEST_F(CodecTest, ARestoredCodebookMovesOnAlike) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{3});
  const auto z = at::randn({40, 2}, generator);
  const auto nearest = [&](const EmaCodebook& book) { return at::cdist(z, book.codebook_NZ()).argmin(1); };
  for (const uint64_t before : {0, 3}) {
    auto codes = at::randn({8, 2}, generator);
    codes[5].fill_(100);  // far from everything: it restarts at the fourth update
    EmaCodebook whole(codes, 0.5, 0.5);
    for (uint64_t step = 0; step < before; ++step) whole.update(z, nearest(whole), 7, step);
    io::TensorMap state = whole.state();
    EXPECT_EQ(state.contains("codebook.counts"), before > 0);
    for (auto& [name, tensor] : state) tensor = tensor.clone();  // as from a file
    EmaCodebook restored(state, 8, 2, 0.5, 0.5);
    EXPECT_EQ(restored.revived(), whole.revived());
    for (uint64_t step = before; step < before + 4; ++step) {
      const int64_t revived = whole.update(z, nearest(whole), 7, step);
      EXPECT_EQ(restored.update(z, nearest(restored), 7, step), revived);
      EXPECT_TRUE(at::equal(restored.codebook_NZ(), whole.codebook_NZ())) << step;
    }
    EXPECT_GT(whole.revived(), 0);
    EXPECT_EQ(restored.revived(), whole.revived());
    EXPECT_SAYS("tensor codebook.codes of the checkpoint must be Float [16, 2], got Float [8, 2]",
                EmaCodebook(state, 16, 2, 0.5, 0.5));
    state.erase("codebook.codes");
    EXPECT_SAYS("has no tensor codebook.codes", EmaCodebook(state, 8, 2, 0.5, 0.5));
  }
}

TEST_F(CodecTest, ACodebookIsFittedToSeparatedClusters) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{2});
  const auto centres = at::tensor({0.0f, 0.0f, 10.0f, 0.0f, 0.0f, 10.0f}).view({3, 2});
  const auto points = (centres.unsqueeze(1) + 0.01 * at::randn({3, 50, 2}, generator)).view({150, 2});
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const auto found = fit_codebook(points, 3, 10, seed);
    const auto distance = at::cdist(centres, found);
    EXPECT_LT(std::get<0>(distance.min(1)).max().item<double>(), 0.05) << found;
  }
  EXPECT_EQ(fit_codebook(points.narrow(0, 0, 2), 4, 3, 1).size(0), 4);  // fewer points than codes
}

TEST_F(CodecTest, StraightThroughGradients) {
  VqCodec model(tiny(), 3);
  const auto encoder = model.encoder_parameters();
  for (const auto& [name, p] : encoder) p.requires_grad_(true);
  const auto x = to_float(drawings(4, 12));
  const auto z = model.embed(x);
  const auto codes = model.codebook_NZ().index({model.nearest(z)});
  const auto through = z + (codes - z).detach();
  EXPECT_LT((through - codes).abs().max().item<double>(), 1e-6);  // forward: the codes
  // Backward: the gradient with respect to z is the decoder's at the codes.
  auto leaf = codes.detach().clone().requires_grad_(true);
  const auto expected = torch::autograd::grad({(model.render(leaf) - x).abs().mean()}, {leaf})[0];
  const auto got = torch::autograd::grad({(model.render(through) - x).abs().mean()}, {z})[0];
  EXPECT_TRUE(at::allclose(got, expected, 1e-4, 1e-7));
  EXPECT_GT(expected.abs().sum().item<double>(), 0);
}

TEST_F(CodecTest, BadPicturesAreSkippedAndCounted) {
  auto drawn = drawings(3, 12);
  for (int i = 0; i < 3; ++i) io::save_image(dir_ / ("p" + std::to_string(i) + ".png"), drawn[i]);
  io::write_file_atomic(dir_ / "broken.png", "not a picture");
  const auto folder = load_pictures(dir_, 12, "pad");
  EXPECT_EQ(folder.paths.size(), 3u);
  EXPECT_EQ(folder.skipped, 1);
  EXPECT_TRUE(at::equal(folder.pixels_N3HW, drawn));

  io::write_file_atomic(dir_ / "m.jsonl",
                        "{\"image\": \"p2.png\", \"text\": \"two\"}\n\n{\"text\": \"no picture\"}\n{\"image\": "
                        "\"gone.png\"}\n{\"image\": \"p0.png\"}\n");
  const auto listed = load_pictures(dir_ / "m.jsonl", 12, "pad");
  EXPECT_EQ(listed.skipped, 1);
  EXPECT_TRUE(at::equal(listed.pixels_N3HW, at::stack({drawn[2], drawn[0]})));
  EXPECT_EQ(load_pictures(dir_ / "m.jsonl", 6, "crop").pixels_N3HW.size(3), 6);

  io::write_file_atomic(dir_ / "bad.jsonl", "{\"image\": \"p2.png\"}\n[1]\n");
  EXPECT_EQ(load_pictures(dir_ / "bad.jsonl", 12, "pad").skipped, 1);
  io::write_file_atomic(dir_ / "none.jsonl", "{\"image\": \"broken.png\"}\n");
  EXPECT_SAYS("none of its 1 pictures decodes", load_pictures(dir_ / "none.jsonl", 12, "pad"));
  io::write_file_atomic(dir_ / "empty.jsonl", "");
  EXPECT_SAYS("names no picture", load_pictures(dir_ / "empty.jsonl", 12, "pad"));
  EXPECT_SAYS("do not exist", load_pictures(dir_ / "gone.jsonl", 12, "pad"));
  EXPECT_SAYS("memory limit", load_pictures(dir_ / "m.jsonl", 12, "pad", 100));
}

}  // namespace
}  // namespace moegraft::codec
