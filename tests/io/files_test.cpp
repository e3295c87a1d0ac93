#include "moegraft/io/files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

class Files : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("moegraft_files_" + std::to_string(::getpid()));
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  template <class F>
  static std::string error_of(F f) {
    try {
      f();
    } catch (const UserError& error) {
      return error.what();
    }
    return "no error";
  }
  fs::path dir_;
};

TEST_F(Files, RoundTripsAnyBytes) {
  std::string bytes(100000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 31);
  for (const std::string& content : {std::string(), std::string("x"), bytes}) {
    write_file_atomic(dir_ / "f", content);
    EXPECT_EQ(read_file(dir_ / "f"), content);
  }
  EXPECT_FALSE(read_file("/proc/self/status").empty()) << "a file that reports size 0";
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()), 1);
}

TEST_F(Files, ErrorsNameThePathAndTheReason) {
  EXPECT_EQ(error_of([] { read_file("/nonexistent/f"); }), "cannot read /nonexistent/f: No such file or directory");
  EXPECT_EQ(error_of([&] { read_file(dir_); }), "cannot read " + dir_.string() + ": it is a directory, expected a file");
  EXPECT_EQ(error_of([] { write_file_atomic("/nonexistent/f", "x"); }), "cannot write /nonexistent/f: No such file or directory");
  EXPECT_NE(error_of([] { checksum_file("/nonexistent/f"); }), "no error");
  EXPECT_NE(error_of([] { sync_directory("/nonexistent"); }), "no error");
  fs::create_directories(dir_ / "d");
  EXPECT_NE(error_of([&] { write_file_atomic(dir_ / "d", "x"); }), "no error");
  EXPECT_TRUE(fs::is_directory(dir_ / "d"));
}

TEST_F(Files, ChecksumIsXxh64) {
  // Published answers of XXH64 with seed 0.
  EXPECT_EQ(checksum_hex(""), "ef46db3751d8e999");
  EXPECT_EQ(checksum_hex("a"), "d24ec4f1a98c6e5b");
  EXPECT_EQ(checksum_hex("abc"), "44bc2cf5ad770999");
  EXPECT_EQ(checksum_hex("Nobody inspects the spammish repetition"), "fbcea83c8a378bf1");
  // File and memory agree over the chunk border.
  std::string bytes((1 << 20) + 77, 'q');
  write_file_atomic(dir_ / "f", bytes);
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(checksum_file(dir_ / "f")));
  EXPECT_EQ(checksum_hex(bytes), hex);
  bytes[500000] ^= 1;
  EXPECT_NE(checksum_hex(bytes), hex);
}

TEST_F(Files, JsonErrorsNameLineAndColumn) {
  write_json(dir_ / "j", {{"a", 1}, {"name", "\xff broken utf-8"}});
  EXPECT_EQ(read_json(dir_ / "j")["a"], 1);
  write_file_atomic(dir_ / "j", "{\n  \"a\": 1,\n  \"b\": }\n");
  const std::string error = error_of([&] { read_json(dir_ / "j"); });
  EXPECT_EQ(error.find((dir_ / "j").string() + ":3:8: not valid JSON"), 0u) << error;
  write_file_atomic(dir_ / "j", "");
  EXPECT_NE(error_of([&] { read_json(dir_ / "j"); }).find("the file is empty"), std::string::npos);
}

}  // namespace
}  // namespace moegraft::io
