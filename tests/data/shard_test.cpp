#include "moegraft/data/shard.h"

#include <gtest/gtest.h>

#include <fstream>
#include <functional>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/io/safetensors.h"
#include "tests_data.h"

namespace moegraft::data {
namespace {

using test::error_of;
using test::Folder;
using Ids = std::vector<int32_t>;

const Schema kSchema{{{"text", 11, 0}, {"image", 5, 4}}};

void write(const std::filesystem::path& path, io::TensorMap tensors, std::map<std::string, std::string> changes = {}) {
  std::map<std::string, std::string> metadata = {{"format", "moegraft.shard"}, {"version", "1"},
                                                 {"modalities", "text,image"}, {"text_vocab", "11"},
                                                 {"codes_image", "5"},         {"item_length_image", "4"}};
  for (auto& [key, value] : changes) metadata[key] = value;
  io::TensorMap all = {{"ids", at::tensor(Ids{5, 6, 0, 1, 2, 3}, at::kInt)},
                       {"modality", at::tensor(std::vector<uint8_t>{0, 0, 1, 1, 1, 1}, at::kByte)},
                       {"document_offsets", at::tensor(std::vector<int64_t>{0, 6}, at::kLong)}};
  for (auto& [name, tensor] : tensors) all[name] = tensor;
  io::save_safetensors(path, all, metadata);
}

TEST(Shard, ReadsWhatThePythonPackageWrote) {
  const ShardSet shards(test_source_dir() + "/tests/golden/data/shard.safetensors");
  ASSERT_EQ(shards.schema(), kSchema);
  ASSERT_EQ(shards.num_documents(), 3);
  EXPECT_EQ(shards.num_tokens(), 18);
  EXPECT_EQ(test::to_lists(shards.document(0)), (test::Lists{{0, {5, 6, 7}}}));
  EXPECT_EQ(test::to_lists(shards.document(1)), (test::Lists{{0, {8, 9}}, {1, {0, 1, 2, 3}}}));
  EXPECT_EQ(test::to_lists(shards.document(2)), (test::Lists{{1, {3, 2, 1, 0, 4, 4, 4, 4}}, {0, {10}}}));
  shards.validate();
}

// The golden file and write() above have the metadata of before there were positions and codebooks.
TEST(Shard, WithoutPositionsAndCodebooksThereIsOneCodebook) {
  Folder folder;
  write(folder / "x.safetensors", {});
  const ModalitySchema image = ShardSet(folder / "x.safetensors").schema().modalities[1];
  EXPECT_EQ(image.codebooks, 1);
  EXPECT_TRUE(image.positions.empty());
  // Such a schema is written again as it was.
  test::write_shards(folder / "s", kSchema, {{{1, {0, 1, 2, 3}}}});
  const io::SafetensorsFile file(folder / "s/shard-00000.safetensors");
  EXPECT_FALSE(file.metadata().contains("codebooks_image"));
  EXPECT_FALSE(file.metadata().contains("positions_image"));
}

TEST(Shard, WriterRoundTripsOverSeveralFiles) {
  Folder folder;
  ShardWriter writer(folder / "s", kSchema, false, 7);
  std::vector<test::Lists> documents;
  for (int32_t i = 0; i < 20; ++i) {
    test::Lists document = {{0, Ids(1 + i % 4, i % 11)}};
    if (i % 3 == 0) document.push_back({1, {0, 1, 2, i % 5}});
    documents.push_back(document);
    writer.add(test::to_segments(document));
  }
  writer.finish();
  const ShardSet shards(folder / "s");
  ASSERT_EQ(shards.num_documents(), 20);
  EXPECT_EQ(shards.num_tokens(), writer.num_tokens());
  int64_t files = std::distance(std::filesystem::directory_iterator(folder / "s"), {});
  EXPECT_GT(files, 5);
  for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(test::to_lists(shards.document(i)), documents[i]) << i;
  EXPECT_NE(error_of([&] { ShardWriter(folder / "s", kSchema); }).find("--overwrite"), std::string::npos);
  ShardWriter again(folder / "s", kSchema, true);
  again.add(test::to_segments(documents[0]));
  again.finish();
  EXPECT_EQ(ShardSet(folder / "s").num_documents(), 1);
}

TEST(Shard, ItemsOfSeveralDocuments) {
  Folder folder;
  // Items of 1, 2, 3, ... documents; a file ends between two of them.
  ShardWriter writer(folder / "s", kSchema, false, 6);
  std::vector<int64_t> sizes{1, 2, 3, 1, 4, 2, 1, 1};
  for (size_t item = 0; item < sizes.size(); ++item)
    for (int64_t i = 0; i < sizes[item]; ++i) writer.add(test::to_segments({{0, Ids(1, int32_t(item))}}), i > 0);
  writer.finish();
  const ShardSet shards(folder / "s");
  EXPECT_GT(std::distance(std::filesystem::directory_iterator(folder / "s"), {}), 1);
  ASSERT_EQ(shards.num_items(), int64_t(sizes.size()));
  int64_t first = 0;
  for (size_t item = 0; item < sizes.size(); ++item) {
    const Item found = shards.item(int64_t(item));
    EXPECT_EQ(found.first, first) << item;
    EXPECT_EQ(found.count, sizes[item]) << item;
    EXPECT_EQ(shards.document(first)[0].ids[0], int32_t(item));
    first += sizes[item];
  }
  EXPECT_EQ(first, shards.num_documents());
  // Where none has a second document nothing is stored.
  test::write_shards(folder / "plain", kSchema, {{{0, {1}}}, {{0, {2}}}});
  EXPECT_EQ(ShardSet(folder / "plain").num_items(), 2);
  EXPECT_FALSE(io::SafetensorsFile(folder / "plain" / "shard-00000.safetensors").contains("item_offsets"));
}

TEST(Shard, WriterRefusesBadDocuments) {
  Folder folder;
  ShardWriter writer(folder / "s", kSchema);
  const Ids text{11}, code{5, 0, 0, 0}, broken{0, 1, 2};
  EXPECT_NE(error_of([&] { writer.add({{0, text}}); }).find("text id 11 is outside [0, 11)"), std::string::npos);
  EXPECT_NE(error_of([&] { writer.add({{1, code}}); }).find("image id 5"), std::string::npos);
  EXPECT_NE(error_of([&] { writer.add({{1, broken}}); }).find("whole number of items"), std::string::npos);
  EXPECT_NE(error_of([&] { writer.add({}); }).find("empty"), std::string::npos);
  EXPECT_NE(error_of([&] { ShardWriter(folder / "t", kSchema).finish(); }).find("empty"), std::string::npos);
}

TEST(Shard, NamesWhatIsWrongInAFile) {
  struct Case {
    const char* expected;
    io::TensorMap tensors;
    std::map<std::string, std::string> metadata;
  };
  const auto longs = [](std::vector<int64_t> v) { return at::tensor(v, at::kLong); };
  const std::vector<Case> cases = {
      {"\"format\" must be", {}, {{"format", "pt"}}},
      {"version must be \"1\", got \"2\"", {}, {{"version", "2"}}},
      {"\"text_vocab\" must be a positive integer, got \"many\"", {}, {{"text_vocab", "many"}}},
      {"must be a positive integer, got \"0\"", {}, {{"item_length_image", "0"}}},
      {"must be \"text\", then the others", {}, {{"modalities", "image,text"}}},
      {"\"codes_audio\" is missing", {}, {{"modalities", "text,audio"}}},
      {"\"codebooks_image\" must be a positive integer, got \"0\"", {}, {{"codebooks_image", "0"}}},
      {"2 codebooks of image must divide its 5 codes and its item length 4", {}, {{"codebooks_image", "2"}}},
      {"3 codebooks of image must divide its 6 codes and its item length 4",
       {},
       {{"codebooks_image", "3"}, {"codes_image", "6"}}},
      {"\"positions_image\" must be like \"6x4\" (rows x columns) or \"75\", got \"2*2\"",
       {},
       {{"positions_image", "2*2"}}},
      {"2x3 positions of image with 1 codebook(s) make items of 6 codes, its item length is 4",
       {},
       {{"positions_image", "2x3"}}},
      {"\"ids\" must be Int", {{"ids", longs({5, 6, 0, 1, 2, 3})}}, {}},
      {"as many entries", {{"modality", at::zeros({5}, at::kByte)}}, {}},
      {"go from 0 to 6", {{"document_offsets", longs({0, 7})}}, {}},
      {"go from 0 to 6", {{"document_offsets", longs({1, 6})}}, {}},
      {"must rise", {{"document_offsets", longs({0, 3, 3, 6})}}, {}},
      {"must rise", {{"document_offsets", longs({0, 9, 3, 6})}}, {}},
      {"\"item_offsets\" must go from 0 to 1", {{"item_offsets", longs({0, 2})}}, {}},
      {"\"item_offsets\" must rise, but item 1 is [1, 1)", {{"item_offsets", longs({0, 1, 1})}}, {}},
      {"\"item_offsets\" must have one entry more than there are items, got none", {{"item_offsets", longs({})}}, {}},
      {"text id 11 at token 1", {{"ids", at::tensor(Ids{5, 11, 0, 1, 2, 3}, at::kInt)}}, {}},
      {"image id -1 at token 2", {{"ids", at::tensor(Ids{5, 6, -1, 1, 2, 3}, at::kInt)}}, {}},
      {"modality 2 at token 0", {{"modality", at::tensor(std::vector<uint8_t>{2, 0, 1, 1, 1, 1}, at::kByte)}}, {}},
      {"run of 3 image codes", {{"modality", at::tensor(std::vector<uint8_t>{0, 0, 0, 1, 1, 1}, at::kByte)}}, {}},
  };
  Folder folder;
  for (const auto& c : cases) {
    write(folder / "x.safetensors", c.tensors, c.metadata);
    const std::string error = error_of([&] { ShardSet(folder / "x.safetensors").validate(); });
    EXPECT_NE(error.find(c.expected), std::string::npos) << c.expected << " in: " << error;
    EXPECT_NE(error.find("x.safetensors"), std::string::npos);
  }
  write(folder / "x.safetensors", {});
  EXPECT_EQ(error_of([&] { ShardSet(folder / "x.safetensors").validate(); }), "");
}

// Private memory of this process, in bytes; pages of mapped files do not count.
int64_t private_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("RssAnon:")) return std::stoll(line.substr(8)) << 10;
  return -1;
}

// A sparse file: three documents, the second of T - 12 tokens. pad: spaces behind the header, which move the data.
void write_sparse(const std::filesystem::path& path, int64_t T, int64_t pad = 0) {
  const std::string offsets = std::to_string(32), ids = std::to_string(32 + 4 * T), end = std::to_string(32 + 5 * T),
                    shape = "\"shape\":[" + std::to_string(T) + "]";
  std::string header =
      R"({"__metadata__":{"format":"moegraft.shard","version":"1","modalities":"text","text_vocab":"11"},)"
      R"("document_offsets":{"dtype":"I64","shape":[4],"data_offsets":[0,)" +
      offsets + R"(]},"ids":{"dtype":"I32",)" + shape + R"(,"data_offsets":[)" + offsets + "," + ids +
      R"(]},"modality":{"dtype":"U8",)" + shape + R"(,"data_offsets":[)" + ids + "," + end + "]}}";
  header.append((8 - header.size() % 8) % 8 + pad, ' ');
  const uint64_t header_bytes = header.size();
  const int64_t document_offsets[] = {0, 8, T - 4, T};
  const int32_t last[] = {7, 8, 9, 10};
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&header_bytes), 8)
      .write(header.data(), header.size())
      .write(reinterpret_cast<const char*>(document_offsets), 32);
  out.seekp(8 + header_bytes + 32 + 4 * (T - 4));
  out.write(reinterpret_cast<const char*>(last), 16);
  out.close();
  std::filesystem::resize_file(path, 8 + header_bytes + 32 + 5 * T);
}

TEST(Shard, StaysMappedAndReadsNoMoreThanItsDocuments) {
  Folder folder;
  constexpr int64_t T = int64_t(1) << 28;  // 1.25 GiB, almost all of it a hole
  write_sparse(folder / "x.safetensors", T);
  const int64_t before = private_memory();
  ASSERT_GT(before, 0);
  const ShardSet shards(folder / "x.safetensors");
  EXPECT_EQ(shards.num_tokens(), T);
  EXPECT_EQ(shards.document_length(1), T - 12);
  EXPECT_EQ(test::to_lists(shards.document(0)), (test::Lists{{0, Ids(8, 0)}}));
  EXPECT_EQ(test::to_lists(shards.document(2)), (test::Lists{{0, {7, 8, 9, 10}}}));
  EXPECT_LT(private_memory() - before, 16 << 20);
}

TEST(Shard, ReadsAFileThatAlignsNothing) {
  Folder folder;
  write_sparse(folder / "x.safetensors", 1000, 1);
  EXPECT_FALSE(io::SafetensorsFile(folder / "x.safetensors").is_view("ids"));
  EXPECT_TRUE(io::SafetensorsFile(folder / "x.safetensors").is_view("modality"));
  ::testing::internal::CaptureStderr();
  const ShardSet shards(folder / "x.safetensors");
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("not aligned"), std::string::npos);
  EXPECT_EQ(test::to_lists(shards.document(2)), (test::Lists{{0, {7, 8, 9, 10}}}));
}

TEST(Shard, MissingEmptyAndTruncatedSources) {
  Folder folder;
  EXPECT_NE(error_of([&] { ShardSet(folder / "none"); }).find("not found"), std::string::npos);
  std::filesystem::create_directory(folder / "empty");
  EXPECT_NE(error_of([&] { ShardSet(folder / "empty"); }).find("holds no shard"), std::string::npos);
  write(folder / "x.safetensors", {{"ids", at::zeros({0}, at::kInt)},
                                   {"modality", at::zeros({0}, at::kByte)},
                                   {"document_offsets", at::zeros({1}, at::kLong)}});
  EXPECT_NE(error_of([&] { ShardSet(folder / "x.safetensors"); }).find("is empty"), std::string::npos);
  write(folder / "x.safetensors", {});
  std::filesystem::resize_file(folder / "x.safetensors", std::filesystem::file_size(folder / "x.safetensors") - 3);
  EXPECT_NE(error_of([&] { ShardSet(folder / "x.safetensors"); }).find("x.safetensors"), std::string::npos);
  std::filesystem::create_directory(folder / "mixed");
  write(folder / "mixed/a.safetensors", {});
  write(folder / "mixed/b.safetensors", {}, {{"text_vocab", "12"}});
  EXPECT_NE(error_of([&] { ShardSet(folder / "mixed"); }).find("other modalities"), std::string::npos);
}

TEST(ShardSet, ASetThatLostAFileIsIncomplete) {
  const Folder folder;
  const auto make = [&](const std::filesystem::path& to) {
    ShardWriter writer(to, kSchema, true, 7);
    for (int i = 0; i < 6; ++i) {
      const std::vector<int32_t> ids{1, 2, 3, 4};
      writer.add({{0, ids}});
    }
    writer.finish();
  };
  const auto message = [&](const std::filesystem::path& of) { return error_of([&] { const ShardSet set(of); }); };
  make(folder / "whole");
  EXPECT_EQ(ShardSet(folder / "whole").num_documents(), 6);
  for (const char* lost : {"shard-00000", "shard-00001", "shard-00002"}) {
    make(folder / lost);
    std::filesystem::remove(folder / lost / (std::string(lost) + ".safetensors"));
    EXPECT_NE(message(folder / lost).find("is incomplete: it holds 2 file(s)"), std::string::npos)
        << lost << ": " << message(folder / lost);
  }
  make(folder / "mixed");
  std::filesystem::copy_file(folder / "mixed/shard-00000.safetensors", folder / "mixed/shard-99999.safetensors");
  EXPECT_NE(message(folder / "mixed").find("is incomplete: it holds 4 file(s) of a set of 3"), std::string::npos)
      << message(folder / "mixed");
  EXPECT_EQ(ShardSet(folder / "whole/shard-00001.safetensors").num_documents(), 2)
      << "one file by itself is what its reader asked for";
}

TEST(ShardWriter, WhatIsNoShardIsNeverReplaced) {
  const Folder folder;
  std::filesystem::create_directories(folder / "model");
  io::save_safetensors(folder / "model/model.safetensors", {{"weight", at::ones({2})}});
  EXPECT_NE(error_of([&] {
              ShardWriter(folder / "model", kSchema, true);
            }).find("holds model.safetensors, which is no shard"),
            std::string::npos);
  EXPECT_TRUE(std::filesystem::exists(folder / "model/model.safetensors"));
}

// Of two jobs at once, and of what somebody puts there meanwhile, nothing is lost.
TEST(ShardWriter, WhatWasMadeMeanwhileIsNotReplaced) {
  const Folder folder;
  const auto finish = [&](const std::string& name, bool overwrite, const std::function<void()>& meanwhile) {
    ShardWriter writer(folder / name, kSchema, overwrite);
    writer.add(test::to_segments({{0, {5, 6}}}));
    meanwhile();
    return error_of([&] { writer.finish(); });
  };
  EXPECT_EQ(finish("other", false, [] {}), "");
  for (const bool overwrite : {false, true}) {
    const std::string name = overwrite ? "allowed" : "refused";
    const std::string error =
        finish(name, overwrite, [&] { std::filesystem::rename(folder / "other", folder / name); });
    if (overwrite)
      EXPECT_EQ(error, "");
    else
      EXPECT_NE(error.find("already holds 1 shard(s); give --overwrite"), std::string::npos) << error;
    std::filesystem::rename(folder / name, folder / "other");
    const std::string notes = finish(name, overwrite, [&] {
      std::filesystem::create_directories(folder / name);
      std::ofstream(folder / name / "notes.txt") << "mine";
    });
    EXPECT_NE(notes.find("holds notes.txt, which is no shard"), std::string::npos) << notes;
    EXPECT_TRUE(std::filesystem::exists(folder / name / "notes.txt"));
  }
}

TEST(ShardWriter, AnUnfinishedSetIsNotThere) {
  const Folder folder;
  {
    ShardWriter writer(folder / "s", kSchema, false, 3);
    const std::vector<int32_t> ids{1, 2, 3, 4};
    for (int i = 0; i < 4; ++i) writer.add({{0, ids}});
    EXPECT_FALSE(std::filesystem::exists(folder / "s"));
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "s"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder / "."), {}), 0) << "nothing is left of it";
}

}  // namespace
}  // namespace moegraft::data
