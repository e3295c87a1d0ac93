#include "moegraft/io/files.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"
#include "moegraft/io/staged_folder.h"

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
    } catch (const UserError& error) { return error.what(); }
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
  EXPECT_EQ(error_of([&] { read_file(dir_); }),
            "cannot read " + dir_.string() + ": it is a directory, expected a file");
  EXPECT_EQ(error_of([] { write_file_atomic("/nonexistent/f", "x"); }),
            "cannot write /nonexistent/f: No such file or directory");
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

// Ends a process while it stages `target`; false when it could not begin.
bool kill_while_staging(const fs::path& target) {
  int ready[2];
  if (::pipe(ready) != 0) return false;
  const pid_t child = ::fork();
  if (child == 0) {
    const StagedFolder staged(target);
    write_file_atomic(staged.path() / "f", "half");
    if (::write(ready[1], "x", 1) == 1) ::pause();
    ::_exit(1);
  }
  ::close(ready[1]);
  char byte;
  const bool staged = ::read(ready[0], &byte, 1) == 1;
  ::close(ready[0]);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  return staged;
}

TEST_F(Files, WhatAKilledProcessStagedIsRemovedByTheNext) {
  const auto names = [&] {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(dir_)) found.insert(entry.path().filename().string());
    return found;
  };
  ASSERT_TRUE(kill_while_staging(dir_ / "set"));
  ASSERT_TRUE(kill_while_staging(dir_ / "settee"));
  ASSERT_EQ(names().size(), 2u);
  const auto other = [&] {
    for (const auto& name : names())
      if (name.starts_with(".settee.")) return name;
    return std::string();
  }();
  fs::create_directories(dir_ /
                         ".set.part-1");  // between the two steps of publish(), where a file system exchanges nothing
  fs::create_directories(dir_ / ".set.part-1.old");
  for (const char* name : {".set.part-mynotes", ".set.part-", ".set.part-07", ".set.part-7a"})
    fs::create_directories(dir_ / name);  // somebody's own
  StagedFolder staged(dir_ / "set");
  const std::set<std::string> expected{
      other,        ".set.part-1",  ".set.part-1.old", ".set.part-mynotes",
      ".set.part-", ".set.part-07", ".set.part-7a",    staged.path().filename().string()};
  EXPECT_EQ(names(), expected);
  // What a living process stages stays.
  if (::fork() == 0) {
    const StagedFolder beside(dir_ / "set");
    ::_exit(0);
  }
  ::wait(nullptr);
  EXPECT_TRUE(fs::exists(staged.path()));
  write_file_atomic(staged.path() / "f", "whole");
  staged.publish();
  EXPECT_EQ(read_file(dir_ / "set/f"), "whole");
}

// What is there when the folder is published counts, not what was there when it was begun.
TEST_F(Files, WhatIsThereByNowIsReplacedByPermissionOnly) {
  const auto refuse = [] { fail("refused"); };
  const auto allow = [] {};
  const struct {
    const char *name, *meanwhile, *error, *content;  // what somebody else makes of the target
    std::function<void()> check;
  } cases[] = {{"absent", "", "no error", "new", {}},
               {"absent, refused", "", "no error", "new", refuse},
               {"empty", "folder", "no error", "new", {}},
               {"taken", "file in folder", "name another folder, or remove it first", "old", {}},
               {"taken, refused", "file in folder", "refused", "old", refuse},
               {"taken, allowed", "file in folder", "no error", "new", allow},
               {"a file", "file", "name another folder, or remove it first", "", {}}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    const fs::path parent = dir_ / c.name, target = parent / "set";
    {
      StagedFolder staged(target);
      write_file_atomic(staged.path() / "f", "new");
      const std::string meanwhile = c.meanwhile;
      if (meanwhile.ends_with("folder")) fs::create_directories(target);
      if (meanwhile == "file in folder") write_file_atomic(target / "f", "old");
      if (meanwhile == "file") write_file_atomic(target, "old");
      const std::string error = error_of([&] { staged.publish(c.check); });
      EXPECT_NE(error.find(c.error), std::string::npos) << error;
    }
    EXPECT_EQ(read_file(*c.content ? target / "f" : target), *c.content ? c.content : "old");
    EXPECT_EQ(std::distance(fs::directory_iterator(parent), {}), 1) << "what was staged is removed";
  }
}

TEST_F(Files, ALinkIsFollowedAndTheCurrentDirectoryStays) {
  fs::create_directories(dir_ / "real");
  fs::create_directory_symlink("real", dir_ / "link");
  fs::create_directory_symlink("link", dir_ / "link2");
  fs::create_directory_symlink("absent/deep", dir_ / "dangling");
  fs::create_directory_symlink("loop", dir_ / "loop");
  for (const auto& [link, real] : {std::pair("link2", "real"), std::pair("dangling/", "absent/deep")}) {
    StagedFolder staged(dir_ / link);
    write_file_atomic(staged.path() / "f", "new");
    staged.publish();
    EXPECT_TRUE(
        fs::is_symlink(fs::path((dir_ / link).string().substr(0, (dir_ / link).string().find_last_not_of('/') + 1))));
    EXPECT_EQ(read_file(dir_ / real / "f"), "new");
  }
  EXPECT_NE(error_of([&] { StagedFolder(dir_ / "loop"); }).find("leads to itself"), std::string::npos);
  const fs::path before = fs::current_path();
  fs::create_directories(dir_ / "here/below");
  fs::current_path(dir_ / "here/below");
  for (const char* name : {".", "..", "../below/"})
    EXPECT_NE(error_of([&] { StagedFolder{fs::path(name)}; }).find("is the current directory or holds it"),
              std::string::npos)
        << name;
  EXPECT_EQ(error_of([&] { StagedFolder{fs::path("../beside")}; }), "no error");
  fs::current_path(before);
}

}  // namespace
}  // namespace moegraft::io
