#include "moegraft/graft/vocabulary_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"

namespace moegraft::graft {
namespace {

class VocabularyFile : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / ("moegraft-vocabulary-" + std::to_string(::getpid()));
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::filesystem::path dir_;
};

TEST_F(VocabularyFile, KeepsSeveralModalitiesAndTheirCodebooks) {
  const model::Vocabulary v{100, 1, 2, {{"image", 1, 100, 9, 6}, {"sound", 2, 111, 8, 6, 2}}};
  write_vocabulary(dir_, v);
  const auto read = read_vocabulary(dir_);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->size(), v.size());
  ASSERT_EQ(read->modalities.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const auto &a = read->modalities[i], &b = v.modalities[i];
    EXPECT_EQ(a.name, b.name);
    EXPECT_EQ(a.first_id, b.first_id);
    EXPECT_EQ(a.num_codes, b.num_codes);
    EXPECT_EQ(a.item_length, b.item_length);
    EXPECT_EQ(a.codebooks, b.codebooks);
  }
}

// As runs were written before there were codebooks.
TEST_F(VocabularyFile, WithoutCodebooksThereIsOne) {
  io::write_file_atomic(
      dir_ / "vocabulary.json",
      R"({"text_size": 100, "bos_id": 1, "eos_id": 2, "size": 118, "modalities": [{"name": "image", "modality": 1, "first_id": 100, "begin_id": 100, "end_id": 101, "num_codes": 16, "item_length": 4}]})");
  const auto read = read_vocabulary(dir_);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->modalities[0].codebooks, 1);
  EXPECT_EQ(read->modalities[0].codebook_size(), 16);
}

TEST_F(VocabularyFile, CodebooksDivideCodesAndItems) {
  write_vocabulary(dir_, {100, 1, 2, {{"sound", 1, 100, 8, 6, 2}}});
  const io::Json written = io::read_json(dir_ / "vocabulary.json");
  for (const int64_t codebooks : {0, -2, 3, 4}) {  // 4 divides the codes, 3 the item alone
    io::Json j = written;
    j["modalities"][0]["codebooks"] = codebooks;
    io::write_json(dir_ / "vocabulary.json", j);
    try {
      read_vocabulary(dir_);
      ADD_FAILURE() << codebooks;
    } catch (const UserError& e) {
      EXPECT_NE(std::string(e.what()).find("sound: " + std::to_string(codebooks) +
                                           " codebooks do not divide its num_codes and item_length: damaged"),
                std::string::npos)
          << e.what();
    }
  }
}

}  // namespace
}  // namespace moegraft::graft
