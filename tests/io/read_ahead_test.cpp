// Files read ahead by threads: every byte once, in order, and errors of any thread reach the caller.
#include "moegraft/io/read_ahead.h"

#include <gtest/gtest.h>

#include "libtorch.h"

#include <unistd.h>

#include <cstring>
#include <fstream>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

class ReadAhead : public ::testing::Test {
 protected:
  ReadAhead() : dir_(fs::temp_directory_path() / ("moegraft_read_ahead_" + std::to_string(::getpid()))) {
    fs::create_directories(dir_);
  }
  ~ReadAhead() override { fs::remove_all(dir_); }

  // A file of random bytes, kept in contents_.
  fs::path write(const std::string& name, int64_t bytes) {
    Rng rng(7, name, 0);
    std::string& text = contents_[dir_ / name];
    for (int64_t i = 0; i < bytes; ++i) text += char(rng.below(256));
    std::ofstream(dir_ / name, std::ios::binary) << text;
    return dir_ / name;
  }
  std::string expected(const FileRange& r) const {
    return contents_.at(r.file).substr(size_t(r.offset), size_t(r.bytes));
  }

  static std::vector<at::Tensor> buffers(int64_t count, int64_t bytes) {
    std::vector<at::Tensor> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(at::full({bytes}, 0xEE, at::kByte));
    return out;
  }
  static std::string text(const at::Tensor& t) {
    return {static_cast<const char*>(t.const_data_ptr()), size_t(t.numel())};
  }

  std::string error_of(const std::vector<FileRange>& ranges) const {
    try {
      read_ahead(ranges, buffers(2, 128), {3, 64}, [](const auto&) {});
    } catch (const UserError& e) { return e.what(); }
    return "";
  }

  fs::path dir_;
  std::map<fs::path, std::string> contents_;
};

TEST_F(ReadAhead, BringsEveryByteOnceFileByFile) {
  const fs::path a = write("a", 5000), b = write("b", 3000), c = write("c", 1);
  const std::vector<FileRange> ranges{{b, 100, 2900}, {a, 4990, 10}, {a, 0, 4000},  {c, 0, 1},
                                      {a, 4000, 0},   {b, 0, 77},    {a, 4001, 333}};
  for (const int64_t room : {64, 192, 1024, 16384})
    for (const int64_t piece : {64, 128, 65536})
      for (const int64_t threads : {1, 2, 5})
        for (const int64_t count : {2, 3}) {
          SCOPED_TRACE(testing::Message() << room << " " << piece << " " << threads << " " << count);
          std::vector<std::string> got;
          for (const auto& r : ranges) got.emplace_back(size_t(r.bytes), '?');
          std::vector<std::pair<fs::path, int64_t>> order;
          read_ahead(ranges, buffers(count, room), {threads, piece}, [&](const std::vector<ReadPiece>& pieces) {
            int64_t bytes = 0;
            for (const auto& p : pieces) {
              EXPECT_EQ(p.begin % 64, 0) << "whole elements of any dtype";
              EXPECT_EQ(p.bytes.storage_offset() % 64, 0);
              got[p.range].replace(size_t(p.begin), size_t(p.bytes.numel()), text(p.bytes));
              order.emplace_back(ranges[p.range].file, ranges[p.range].offset + p.begin);
              bytes += p.bytes.numel();
            }
            EXPECT_GT(bytes, 0);
            EXPECT_LE(bytes, room);
          });
          for (size_t i = 0; i < ranges.size(); ++i) EXPECT_TRUE(got[i] == expected(ranges[i])) << "range " << i;
          EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
        }
}

TEST_F(ReadAhead, WhatIsInUseIsNotOverwritten) {
  const fs::path a = write("a", 4096);
  int64_t at = 0;
  read_ahead({{a, 0, 4096}}, buffers(2, 128), {4, 64}, [&](const std::vector<ReadPiece>& pieces) {
    ::usleep(2000);  // the threads would have the time
    for (const auto& p : pieces) {
      EXPECT_EQ(text(p.bytes), contents_[a].substr(size_t(at), size_t(p.bytes.numel())));
      at += p.bytes.numel();
    }
  });
  EXPECT_EQ(at, 4096);
}

TEST_F(ReadAhead, NothingToReadIsNoWork) {
  int calls = 0;
  read_ahead({}, buffers(2, 64), {}, [&](const auto&) { ++calls; });
  read_ahead({{dir_ / "absent", 0, 0}}, buffers(2, 64), {}, [&](const auto&) { ++calls; });
  EXPECT_EQ(calls, 0);
}

TEST_F(ReadAhead, ErrorsReachTheCallerInOneLine) {
  const fs::path a = write("a", 1000);
  EXPECT_NE(error_of({{a, 0, 1000}, {dir_ / "absent", 0, 10}}).find("absent: No such file"), std::string::npos);
  const std::string cut = error_of({{a, 0, 500}, {a, 600, 600}});
  EXPECT_NE(cut.find("a has 1000 bytes, 1200 are needed: it was cut short"), std::string::npos) << cut;
  EXPECT_NE(error_of({{a, 0, 1000}, {dir_, 0, 1000}}).find("cannot read " + dir_.string() + ": Is a directory"),
            std::string::npos)
      << "a read that fails in a thread";
}

TEST_F(ReadAhead, AFileThatIsCutMeanwhile) {
  const fs::path a = write("a", 4096);
  try {
    read_ahead({{a, 0, 4096}}, buffers(2, 128), {2, 64}, [&](const auto&) { fs::resize_file(a, 100); });
    FAIL() << "most of it was not there any more";
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("a has 100 bytes, "), std::string::npos) << e.what();
  }
}

TEST_F(ReadAhead, EndsWithWhatItsUserThrows) {
  const fs::path a = write("a", 4096);
  int calls = 0;
  EXPECT_THROW(read_ahead({{a, 0, 4096}}, buffers(2, 128), {4, 64},
                          [&](const auto&) {
                            if (++calls == 3) throw std::runtime_error("full");
                          }),
               std::runtime_error);
  EXPECT_EQ(calls, 3);
  EXPECT_THROW(read_ahead({{a, 0, 4096}}, buffers(1, 128), {}, [](const auto&) {}), InvariantError);
  EXPECT_THROW(read_ahead({{a, 0, 4096}}, buffers(2, 100), {}, [](const auto&) {}), InvariantError);
}

}  // namespace
}  // namespace moegraft::io
