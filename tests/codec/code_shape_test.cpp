#include <gtest/gtest.h>
#include "libtorch.h"

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/codec/codec.h"
#include "moegraft/io/files.h"

namespace moegraft::codec {
namespace {

TEST(CodeShape, CountsWhatAnItemHas) {
  const CodeShape grid{{2, 3}}, sequence{{75}, 4};
  EXPECT_EQ(grid.num_positions(), 6);
  EXPECT_EQ(grid.item_length(), 6);
  EXPECT_EQ(sequence.num_positions(), 75);
  EXPECT_EQ(sequence.item_length(), 300);
  EXPECT_NE(grid, (CodeShape{{3, 2}}));
  EXPECT_NE(grid, (CodeShape{{2, 3}, 2}));
}

TEST(CodeShape, PositionsAsText) {
  for (const std::vector<int64_t>& positions : {std::vector<int64_t>{6, 4}, {75}, {1}, {2, 3, 4}})
    EXPECT_EQ(parse_positions(format_positions(positions)), positions);
  EXPECT_EQ(format_positions({6, 4}), "6x4");
  for (const char* text :
       {"", "x", "6x", "x4", "0", "6x0", "-3", "6 x 4", "6.5", "six", "65536x65536", "99999999999999999999"})
    EXPECT_TRUE(parse_positions(text).empty()) << text;
}

// Two codebooks of three codes over a 1 x 2 grid: what decode() is given must be a0 b0 a1 b1 with b in [3, 6).
class TwoCodebooks final : public ImageCodec {
 public:
  std::string architecture() const override { return "two"; }
  CodeShape shape() const override { return {{1, 2}, 2}; }
  int64_t codebook_size() const override { return 3; }
  at::Tensor codebook_NZ() const override { return at::zeros({num_codes(), 1}); }
  int64_t image_size() const override { return 2; }
  at::Tensor encode(const at::Tensor& x) const override {
    return at::tensor({0, 3, 2, 5}, at::kLong).expand({x.size(0), 4});
  }
  at::Tensor decode(const at::Tensor& ids) const override {
    check_ids(ids);
    return at::zeros({ids.size(0), 3, 2, 2});
  }
  void to(at::Device) override {}
};

TEST(Codec, EveryPlaceTakesCodesOfItsCodebook) {
  const TwoCodebooks codec;
  EXPECT_EQ(codec.item_length(), 4);
  EXPECT_EQ(codec.num_codes(), 6);
  const auto error_of = [&](std::vector<int64_t> ids) -> std::string {
    try {
      codec.decode(at::tensor(ids, at::kLong).unsqueeze(0));
    } catch (const UserError& e) { return e.what(); }
    return "";
  };
  EXPECT_EQ(error_of({0, 3, 2, 5}), "");
  EXPECT_EQ(error_of({2, 5, 0, 3}), "");
  EXPECT_EQ(error_of({3, 3, 0, 3}), "code 3 is outside codebook 0 of 2, [0, 3)");
  EXPECT_EQ(error_of({0, 3, 0, 2}), "code 2 is outside codebook 1 of 2, [3, 6)");
  EXPECT_EQ(error_of({0, 3, 0, 6}), "code 6 is outside codebook 1 of 2, [3, 6)");
  EXPECT_EQ(error_of({-1, 3, 0, 3}), "code -1 is outside codebook 0 of 2, [0, 3)");
  EXPECT_EQ(error_of({0, 3}), "codec two decodes ids [B, 4], got [1, 2]");
}

// The README lists what the table has.
TEST(Codec, EveryKindStandsInTheReadme) {
  const std::string readme = io::read_file(test_source_dir() + "/src/codec/README.md");
  for (const auto& kind : codec_kinds())
    EXPECT_NE(readme.find("| `" + std::string(kind.name) + "` | " + kind.what + " |"), std::string::npos) << kind.name;
}

}  // namespace
}  // namespace moegraft::codec
