#include "moegraft/io/image.h"

#include <gtest/gtest.h>
#include "libtorch.h"
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/io";

// The pictures of tests/golden/make_io.py: 6 wide, 4 high.
at::Tensor expected_rgb() {
  const auto y = torch::arange(4).view({4, 1}).expand({4, 6}), x = torch::arange(6).view({1, 6}).expand({4, 6});
  return torch::stack({40 * x, 60 * y, 10 * (x + y)}).to(at::kByte);
}
at::Tensor expected_gray() {
  const auto y = torch::arange(4).view({4, 1}).expand({4, 6}), x = torch::arange(6).view({1, 6}).expand({4, 6});
  return (30 * x + 10 * y).expand({3, 4, 6}).to(at::kByte);
}
at::Tensor on_white(const at::Tensor& image) {
  const auto alpha = torch::tensor({0, 0, 0, 128, 128, 255}).to(at::kDouble);
  return ((image.to(at::kDouble) * alpha + 255 * (255 - alpha)) / 255).round().to(at::kByte);
}
int64_t max_difference(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return a.sizes() == b.sizes() ? (a.to(at::kLong) - b.to(at::kLong)).abs().max().item<int64_t>() : 999;
}
std::string error_of(const std::string& bytes) {
  try {
    decode_image(bytes, "pic");
  } catch (const UserError& error) { return error.what(); }
  return "no error";
}

class Image : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("moegraft_image_" + std::to_string(::getpid()));
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path dir_;
};

TEST_F(Image, PngOfEveryKind) {
  const auto rgb = load_image(kGolden / "rgb.png");
  EXPECT_EQ(rgb.scalar_type(), at::kByte);
  EXPECT_TRUE(rgb.is_contiguous());
  EXPECT_TRUE(torch::equal(rgb, expected_rgb()));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "palette.png"), expected_rgb()));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "gray.png"), expected_gray()));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "gray16.png"), expected_gray()));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "bits1.png"), (expected_gray() > 90).to(at::kByte) * 255));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "rgba.png"), on_white(expected_rgb())));
  EXPECT_TRUE(torch::equal(load_image(kGolden / "la.png"), on_white(expected_gray())));
  auto transparent = expected_rgb();
  transparent.slice(1, 0, 1).slice(2, 0, 1).fill_(255);
  EXPECT_TRUE(torch::equal(load_image(kGolden / "palette_transparent.png"), transparent));
}

TEST_F(Image, OtherFormatsAsPillowWroteThem) {
  for (const char* name : {"rgb.webp", "rgb.gif", "rgb.bmp", "rgb.tif", "deflated.tif"})
    EXPECT_TRUE(torch::equal(load_image(kGolden / name), expected_rgb())) << name;
  const std::pair<const char*, at::Tensor> tiffs[] = {{"bits1.tif", (expected_gray() > 90).to(at::kByte) * 255},
                                                      {"fax.tif", (expected_gray() > 90).to(at::kByte) * 255},
                                                      {"palette.tif", expected_rgb()},
                                                      {"gray16.tif", expected_gray()},
                                                      {"rgba.tif", on_white(expected_rgb())},
                                                      {"cmyk.tif", expected_rgb()}};
  for (const auto& [name, expected] : tiffs)
    EXPECT_TRUE(torch::equal(load_image(kGolden / name), expected)) << name << "\n" << load_image(kGolden / name);
}

// The picture with its orientation tag (0x0112, one short) set to another value.
std::string with_orientation(std::string bytes, char value) {
  const std::string little("\x12\x01\x03\x00\x01\x00\x00\x00", 8), big("\x01\x12\x00\x03\x00\x00\x00\x01", 8);
  if (const size_t at = bytes.find(little); at != std::string::npos)
    bytes[at + 8] = value;
  else if (const size_t here = bytes.find(big); here != std::string::npos)
    bytes[here + 9] = value;
  else
    ADD_FAILURE() << "no orientation tag";
  return bytes;
}

TEST_F(Image, EveryOrientationOfEveryFormat) {
  const auto turn = [](const at::Tensor& stored, int orientation) {
    switch (orientation) {
      case 2: return stored.flip({2});
      case 3: return stored.flip({1, 2});
      case 4: return stored.flip({1});
      case 5: return stored.transpose(1, 2);
      case 6: return torch::rot90(stored, -1, {1, 2});
      case 7: return stored.transpose(1, 2).flip({1, 2});
      case 8: return torch::rot90(stored, 1, {1, 2});
      default: return stored;
    }
  };
  for (const char* name : {"turned.webp", "turned.png", "turned.tif", "rotated.jpg"}) {
    const std::string bytes = read_file(kGolden / name);
    const auto stored = decode_image(with_orientation(bytes, 1), name);
    if (std::string(name) != "rotated.jpg") EXPECT_TRUE(torch::equal(stored, expected_rgb())) << name;
    for (char orientation = 0; orientation <= 9; ++orientation)
      EXPECT_TRUE(torch::equal(decode_image(with_orientation(bytes, orientation), name), turn(stored, orientation)))
          << name << " " << int(orientation);
  }
}

TEST_F(Image, OtherFormatsDamaged) {
  for (const char* name : {"rgb.webp", "rgb.gif", "rgb.bmp", "rgb.tif", "turned.webp"}) {
    const std::string whole = read_file(kGolden / name);
    error_of(whole.substr(0, whole.size() / 2));  // a part may be shown or refused, but nothing else may happen
    for (size_t n = 0; n < std::min<size_t>(whole.size(), 30); ++n)
      EXPECT_NE(error_of(whole.substr(0, n)), "no error") << name << " cut to " << n;
    Rng rng(17, name);
    for (int i = 0; i < 400; ++i) {
      std::string damaged = whole;
      for (int k = 0; k < 3; ++k) damaged[rng.below(damaged.size())] = static_cast<char>(rng.next_u32());
      error_of(damaged);
    }
  }
  // Sizes that would take all memory.
  std::string gif = read_file(kGolden / "rgb.gif"), bmp = read_file(kGolden / "rgb.bmp");
  gif[6] = gif[7] = gif[8] = gif[9] = '\xff';
  bmp[20] = bmp[24] = 0x7f;
  // A width that lies elsewhere in the file (LONG8): 2^30 columns.
  std::string tiff = read_file(kGolden / "rgb.tif");
  const size_t width = tiff.find(std::string("\x00\x01\x04\x00\x01\x00\x00\x00", 8)),
               height = tiff.find(std::string("\x01\x01\x04\x00\x01\x00\x00\x00", 8));
  ASSERT_NE(width, std::string::npos);
  ASSERT_NE(height, std::string::npos);
  std::string far_tiff = tiff;
  tiff[width + 10] = tiff[height + 10] = 1;  // 65,542 x 65,540
  far_tiff[width + 2] = 16;
  const auto end = uint32_t(far_tiff.size());
  std::memcpy(far_tiff.data() + width + 8, &end, 4);
  far_tiff += std::string("\0\0\0\x40\0\0\0\0", 8);
  for (const auto& bomb : {gif, bmp, tiff, far_tiff})
    EXPECT_NE(error_of(bomb).find("pixels are read"), std::string::npos) << error_of(bomb);
}

TEST_F(Image, JpegAsPillowDecodesIt) {
  const SafetensorsFile golden(kGolden / "pixels.safetensors");
  // Decoders may round the inverse DCT and the colour conversion differently by one.
  for (const char* name : {"rgb.jpg", "gray.jpg", "progressive.jpg", "cmyk.jpg"})
    EXPECT_LE(max_difference(load_image(kGolden / name), golden.tensor(name)), 1) << name;
  // Orientation 6: the stored rows are the shown columns, right to left.
  const auto turned = load_image(kGolden / "rotated.jpg");
  EXPECT_EQ(turned.sizes(), (std::vector<int64_t>{3, 32, 24}));
  EXPECT_LE(max_difference(turned, torch::rot90(golden.tensor("rgb.jpg"), -1, {1, 2})), 1);
}

TEST_F(Image, RoundTrips) {
  at::manual_seed(3);
  const auto noise = torch::randint(0, 256, {3, 17, 33}, at::kByte);
  save_image(dir_ / "a.png", noise);
  EXPECT_TRUE(torch::equal(load_image(dir_ / "a.png"), noise));
  save_image(dir_ / "f.PNG", noise.to(at::kFloat) / 255);
  EXPECT_TRUE(torch::equal(load_image(dir_ / "f.PNG"), noise));
  save_image(dir_ / "s.png", noise.transpose(1, 2));
  EXPECT_TRUE(torch::equal(load_image(dir_ / "s.png"), noise.transpose(1, 2)));
  const auto flat = torch::full({3, 16, 16}, 200, at::kByte);
  save_image(dir_ / "a.jpg", flat);
  EXPECT_LE(max_difference(load_image(dir_ / "a.jpg"), flat), 1);
  save_image(dir_ / "n.png", torch::tensor({NAN, -1.0f, 2.0f}).view({3, 1, 1}));
  EXPECT_TRUE(torch::equal(load_image(dir_ / "n.png").flatten(), torch::tensor({0, 0, 255}).to(at::kByte)))
      << load_image(dir_ / "n.png").flatten();
  EXPECT_THROW(save_image(dir_ / "a.gif", noise), UserError);
  EXPECT_THROW(save_image(dir_ / "a.png", noise[0]), UserError);
  EXPECT_THROW(save_image("/nonexistent/a.png", noise), UserError);
}

TEST_F(Image, DamagedPicturesAreErrors) {
  EXPECT_EQ(error_of(""), "pic: the file is empty, expected a picture");
  EXPECT_EQ(error_of("%PDF-1.4"), "pic: not a PNG, JPEG, WebP, GIF, BMP or TIFF picture");
  for (const char* name : {"noise.png", "rgb.jpg", "progressive.jpg", "rotated.jpg", "palette_transparent.png"}) {
    const std::string whole = read_file(kGolden / name);
    const size_t step = whole.size() > 2000 ? 37 : 1;
    // A JPEG may lack its last two bytes, the end marker, and still hold every pixel.
    const size_t enough = whole.size() - (std::string(name).ends_with("jpg") ? 2 : 0);
    for (size_t n = 0; n < enough; n += step)
      EXPECT_NE(error_of(whole.substr(0, n)), "no error") << name << " cut to " << n;
    Rng rng(17, name);
    for (int i = 0; i < 400; ++i) {
      std::string damaged = whole;
      for (int k = 0; k < 3; ++k) damaged[rng.below(damaged.size())] = static_cast<char>(rng.next_u32());
      error_of(damaged);  // must neither crash nor throw anything else
    }
  }
  // A header that promises 2^31-1 pixels each way.
  std::string huge = read_file(kGolden / "rgb.png");
  huge[16] = huge[20] = 0x7f;
  EXPECT_NE(error_of(huge), "no error");
}

TEST_F(Image, ResizeMatchesPillow) {
  const SafetensorsFile golden(kGolden / "pixels.safetensors");
  const auto noise = load_image(kGolden / "noise.png");  // 40 x 56
  const auto half = resize_and_pad(noise, 28);           // 20 x 28, four white rows above and below
  EXPECT_EQ(half.sizes(), (std::vector<int64_t>{3, 28, 28}));
  EXPECT_EQ(half.scalar_type(), at::kFloat);
  EXPECT_TRUE((half.slice(1, 0, 4) == 1).all().item<bool>());
  EXPECT_TRUE((half.slice(1, 24) == 1).all().item<bool>());
  // Pillow rounds to 8 bits after each of its two passes: 0.5 grown by the weights' sum of absolute values (about 1.3),
  // and 0.5.
  const auto reference = golden.tensor("noise_20x28").to(at::kFloat);
  EXPECT_LE((half.slice(1, 4, 24) * 255 - reference).abs().max().item<float>(), 1.2f);
  const auto cropped = resize_and_crop(noise, 20);  // 20 x 28, four columns off each side
  EXPECT_LE((cropped * 255 - reference.slice(2, 4, 24)).abs().max().item<float>(), 1.2f);
}

TEST_F(Image, ResizeClosedForms) {
  const auto rgb = expected_rgb();  // 4 x 6
  EXPECT_TRUE(torch::equal(resize_and_crop(rgb, 4), rgb.slice(2, 1, 5).to(at::kFloat) / 255))
      << "no scaling: the exact centre";
  const auto flat = torch::full({3, 50, 70}, 0.25f);
  for (const int64_t size : {1, 7, 50, 96}) {
    EXPECT_LE((resize_and_crop(flat, size) - 0.25f).abs().max().item<float>(), 1e-6f) << size;
    EXPECT_EQ(resize_and_pad(flat, size).sizes(), (std::vector<int64_t>{3, size, size}));
  }
  EXPECT_EQ(resize_and_crop(torch::zeros({3, 1, 100000}), 64).sizes(), (std::vector<int64_t>{3, 64, 64}));
  EXPECT_EQ(resize_and_pad(torch::zeros({3, 100000, 1}), 64).sizes(), (std::vector<int64_t>{3, 64, 64}));
  EXPECT_THROW(resize_and_crop(rgb, 0), UserError);
  EXPECT_THROW(resize_and_crop(torch::zeros({1, 4, 4}), 4), UserError);
}

TEST_F(Image, ContactSheet) {
  std::vector<at::Tensor> images;
  for (int i = 0; i < 3; ++i) images.push_back(torch::full({3, 2, 3}, 10 * i, at::kByte));
  images[2] = images[2].to(at::kFloat) / 255;
  const auto sheet = contact_sheet(images, 2, 1);
  EXPECT_EQ(sheet.sizes(), (std::vector<int64_t>{3, 7, 9}));
  const auto row = [&](int64_t y) {
    const auto line = sheet[1][y].to(at::kLong).contiguous();
    return std::vector<int64_t>(line.data_ptr<int64_t>(), line.data_ptr<int64_t>() + 9);
  };
  EXPECT_EQ(row(0), (std::vector<int64_t>(9, 255)));
  EXPECT_EQ(row(1), (std::vector<int64_t>{255, 0, 0, 0, 255, 10, 10, 10, 255}));
  EXPECT_EQ(row(3), (std::vector<int64_t>(9, 255)));
  EXPECT_EQ(row(5), (std::vector<int64_t>{255, 20, 20, 20, 255, 255, 255, 255, 255}));
  EXPECT_THROW(contact_sheet({}, 2), UserError);
  EXPECT_THROW(contact_sheet({torch::zeros({3, 2, 2}), torch::zeros({3, 2, 3})}, 2), UserError);
}

}  // namespace
}  // namespace moegraft::io
