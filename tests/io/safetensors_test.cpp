#include "moegraft/io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include "libtorch.h"
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/io/files.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/io";

class Safetensors : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("moegraft_safetensors_" + std::to_string(::getpid()));
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  fs::path file(const std::string& name) const { return dir_ / name; }
  // A file from a header text and a count of data bytes.
  fs::path craft(const std::string& header, size_t data_bytes) const {
    const uint64_t n = header.size();
    std::string bytes(reinterpret_cast<const char*>(&n), 8);
    write_file_atomic(file("crafted"), bytes + header + std::string(data_bytes, '\1'));
    return file("crafted");
  }
  std::string error_of(const std::string& header, size_t data_bytes) const {
    try {
      load_safetensors(craft(header, data_bytes));
    } catch (const UserError& error) { return error.what(); }
    return "no error";
  }
  // Thousands of files: an fsync for each would take half a minute.
  static void write_unsynced(const fs::path& path, std::string_view bytes) {
    fs::remove(path);  // never truncate what may still be mapped
    std::ofstream(path, std::ios::binary) << bytes;
  }
  size_t count_files() const { return std::distance(fs::directory_iterator(dir_), fs::directory_iterator()); }
  fs::path dir_;
};

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(Safetensors, ReadsEveryDtypeOfThePythonPackage) {
  const SafetensorsFile golden(kGolden / "dtypes.safetensors");
  EXPECT_EQ(golden.metadata().at("format"), "pt");
  EXPECT_EQ(golden.names().size(), 15u);
  const auto ramp = torch::arange(12).reshape({3, 4});
  const auto floats = ramp.to(torch::kDouble) / 4 - 1;
  const std::map<std::string, at::ScalarType> floating = {{"f64", at::kDouble},         {"f32", at::kFloat},
                                                          {"f16", at::kHalf},           {"bf16", at::kBFloat16},
                                                          {"e4m3", at::kFloat8_e4m3fn}, {"e5m2", at::kFloat8_e5m2}};
  for (const auto& [name, dtype] : floating) {
    const auto tensor = golden.tensor(name);
    EXPECT_EQ(tensor.scalar_type(), dtype) << name;
    EXPECT_EQ(golden.dtype(name), dtype);
    EXPECT_TRUE(torch::equal(tensor.to(at::kDouble), floats)) << name;
  }
  const std::map<std::string, at::ScalarType> integers = {
      {"i64", at::kLong}, {"i32", at::kInt}, {"i16", at::kShort}, {"i8", at::kChar}, {"u8", at::kByte}};
  for (const auto& [name, dtype] : integers) {
    const auto tensor = golden.tensor(name);
    EXPECT_EQ(tensor.scalar_type(), dtype) << name;
    EXPECT_TRUE(torch::equal(tensor.to(at::kLong), ramp)) << name;
  }
  EXPECT_TRUE(torch::equal(golden.tensor("bool"), ramp % 3 == 0));
  EXPECT_EQ(golden.tensor("scalar").dim(), 0);
  EXPECT_EQ(golden.tensor("scalar").item<float>(), 2.5f);
  EXPECT_EQ(golden.shape("empty"), (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(golden.tensor("empty").numel(), 0);
  EXPECT_TRUE(golden.contains("name with \"quotes\" and ü"));
}

TEST_F(Safetensors, RoundTripKeepsBytesStridesAndMetadata) {
  at::manual_seed(1);
  TensorMap tensors;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16})
    tensors[std::string("r.") + c10::toString(dtype)] = torch::randn({3, 5}).to(dtype);
  tensors["odd"] = torch::randint(0, 255, {7}, at::kByte);
  tensors["transposed"] = torch::randn({4, 6}).t();
  tensors["slice"] = torch::randn({10}).slice(0, 2, 9, 3);
  tensors["flag"] = torch::tensor({true, false, true});
  tensors["none"] = torch::zeros({2, 0, 3});
  tensors["scalar"] = torch::tensor(int64_t{-5});
  tensors["grad"] = torch::randn({2}).requires_grad_();
  save_safetensors(file("a"), tensors, {{"step", "12"}, {"text", "line\n\"quoted\""}});
  const SafetensorsFile back(file("a"));
  EXPECT_EQ(back.metadata().at("text"), "line\n\"quoted\"");
  ASSERT_EQ(back.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const auto read = back.tensor(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read.sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(torch::equal(read, tensor.detach())) << name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(read.const_data_ptr()) % read.element_size(), 0u) << name;
  }
  // The same content gives the same bytes: checkpoints are compared by checksum.
  save_safetensors(file("b"), tensors, {{"text", "line\n\"quoted\""}, {"step", "12"}});
  EXPECT_EQ(checksum_file(file("a")), checksum_file(file("b")));
  EXPECT_EQ(count_files(), 2u) << "a temporary file was left";
}

TEST_F(Safetensors, ViewsAreZeroCopyAndOutliveTheFileObject) {
  save_safetensors(file("a"), {{"x", torch::full({1000}, 3.5f)}});
  at::Tensor x, again;
  {
    const SafetensorsFile mapped(file("a"));
    x = mapped.tensor("x");
    again = mapped.tensor("x");
    EXPECT_EQ(x.const_data_ptr(), again.const_data_ptr());
  }
  save_safetensors(file("a"), {{"x", torch::zeros({1000})}});  // replaces the name, not the mapped bytes
  EXPECT_EQ(x.sum().item<float>(), 3500.0f);
  EXPECT_EQ(load_safetensors(file("a")).at("x").sum().item<float>(), 0.0f);
}

// Kilobytes of the mapping of `path` that are resident in this process.
int64_t resident_kib(const fs::path& path) {
  std::ifstream in("/proc/self/smaps");
  bool here = false;
  int64_t total = 0;
  for (std::string line; std::getline(in, line);) {
    if (line.find('-') != std::string::npos && line.find(':') != std::string::npos &&
        line.find("kB") == std::string::npos)
      here = line.ends_with(path.string());
    else if (here && line.starts_with("Rss:"))
      total += std::stoll(line.substr(4));
  }
  return total;
}

TEST_F(Safetensors, ReleasedPagesComeBack) {
  const fs::path path = dir_ / "large.safetensors";
  const at::Tensor first = at::arange(1 << 20, at::kFloat), second = at::arange(1 << 18, at::kFloat) * 3;
  save_safetensors(path, {{"a", first}, {"b", second}});
  const SafetensorsFile file(path);
  const at::Tensor a = file.tensor("a"), b = file.tensor("b");
  EXPECT_TRUE(file.holds(a));
  EXPECT_FALSE(file.holds(first));
  EXPECT_FALSE(file.release_pages(first));
  EXPECT_TRUE(at::equal(a, first) && at::equal(b, second));
  EXPECT_GE(resident_kib(path), 5 * 1024);
  EXPECT_TRUE(file.release_pages(a));
  EXPECT_LE(resident_kib(path), 1024 + 256);
  EXPECT_GE(resident_kib(path), 512);
  EXPECT_TRUE(file.release_pages(b.narrow(0, 0, 10)));  // part of a tensor
  EXPECT_TRUE(at::equal(a, first) && at::equal(b, second));
}

TEST_F(Safetensors, CopiesMisalignedTensors) {
  // One byte, then a float at an odd offset: legal in the format.
  const float value = 1.25f;
  const std::string header =
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  const fs::path path = craft(header, 5);
  std::string bytes = read_file(path);
  std::memcpy(bytes.data() + bytes.size() - 4, &value, 4);
  write_file_atomic(path, bytes);
  const auto b = SafetensorsFile(path).tensor("b");
  EXPECT_EQ(b.item<float>(), 1.25f);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.const_data_ptr()) % 4, 0u);
}

TEST_F(Safetensors, DamagedHeadersAreNamed) {
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  EXPECT_EQ(error_of(one("F32", "[2]", "[0,8]"), 8), "no error");
  EXPECT_HAS(error_of(one("F32", "[2]", "[0,8]"), 8 - 1), "truncated");
  EXPECT_HAS(error_of(one("F32", "[2]", "[0,8]"), 9), "cover 8 bytes of 9");
  EXPECT_HAS(error_of(one("F32", "[3]", "[0,8]"), 8), "shape [3] of F32 needs 12 bytes, data_offsets give 8");
  EXPECT_HAS(error_of(one("F31", "[2]", "[0,8]"), 8), "tensor 'w': unknown dtype 'F31'");
  EXPECT_HAS(error_of(one("F32", "[-2]", "[0,8]"), 8), "must be a non-negative integer, got -2");
  EXPECT_HAS(error_of(one("F32", "[2.0]", "[0,8]"), 8), "must be a non-negative integer");
  EXPECT_HAS(error_of(one("F32", "[2]", "[8,0]"), 8), "outside");
  EXPECT_HAS(error_of(one("F32", "[2]", "[0,18446744073709551615]"), 8), "outside");
  EXPECT_HAS(error_of(one("F32", "[4611686018427387906,4]", "[0,8]"), 8),
             "overflows");  // the product wraps to 32 bytes
  EXPECT_HAS(error_of(one("F32", "[0,9223372036854775807,9223372036854775807]", "[0,0]"), 0), "overflows");
  EXPECT_HAS(error_of(one("F32", "[18446744073709551615]", "[0,8]"), 8), "overflows");
  EXPECT_HAS(error_of(one("F32", "2", "[0,8]"), 8), "shape must be a list");
  EXPECT_HAS(error_of(one("F32", "[2]", "[0]"), 8), "data_offsets must be [begin, end]");
  EXPECT_HAS(error_of(one("BOOL", "[2]", "[0,2]"), 2), "no error");
  EXPECT_HAS(error_of(R"({"w":{"dtype":"F32"}})", 0), "expected an object with dtype, shape and data_offsets");
  EXPECT_HAS(error_of(R"({"w":7})", 0), "expected an object");
  EXPECT_HAS(error_of(R"([1])", 0), "must be a JSON object");
  EXPECT_HAS(error_of(R"({"w":)", 0), "not valid JSON");
  EXPECT_HAS(error_of(std::string(1000, '['), 0), "nests too deeply");
  EXPECT_HAS(error_of(R"({"__metadata__":{"a":1}})", 0), "must be a string");
  const std::string w = R"("w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  EXPECT_HAS(error_of("{" + w + "," + w + "}", 4), "the key 'w' twice");
  EXPECT_HAS(error_of("{" + w + R"(,"v":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6), "overlaps");
  EXPECT_HAS(error_of("{" + w + R"(,"v":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}})", 8), "hole");
}

TEST_F(Safetensors, BoolBytesAreChecked) {
  const fs::path path = craft(R"({"w":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", 1);
  std::string bytes = read_file(path);
  bytes.back() = 2;
  write_file_atomic(path, bytes);
  EXPECT_THROW(SafetensorsFile(path).tensor("w"), UserError);
}

TEST_F(Safetensors, MissingFilesAndNames) {
  try {
    SafetensorsFile("/nonexistent/model.safetensors");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "cannot read /nonexistent/model.safetensors: No such file or directory");
  }
  EXPECT_THROW(SafetensorsFile{dir_}, UserError);
  write_file_atomic(file("empty"), "");
  EXPECT_THROW(SafetensorsFile{file("empty")}, UserError);
  try {
    SafetensorsFile(kGolden / "dtypes.safetensors").tensor("scalr");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_HAS(std::string(error.what()), "has no tensor 'scalr'; did you mean 'scalar'?");
  }
}

TEST_F(Safetensors, EveryTruncationIsAnError) {
  const std::string whole = read_file(kGolden / "dtypes.safetensors");
  for (size_t n = 0; n < whole.size(); ++n) {
    write_unsynced(file("t"), std::string_view(whole).substr(0, n));
    EXPECT_THROW(load_safetensors(file("t")), UserError) << n;
    if (HasFailure()) return;
  }
}

TEST_F(Safetensors, BitFlipsInTheHeaderNeverCrash) {
  const std::string whole = read_file(kGolden / "dtypes.safetensors");
  uint64_t header_bytes;
  std::memcpy(&header_bytes, whole.data(), 8);
  int64_t refused = 0;
  Rng rng(17, "bit flips");
  for (size_t at = 0; at < 8 + header_bytes; ++at) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << rng.below(8)));
    write_unsynced(file("f"), damaged);
    try {
      // A flip inside a name or a metadata value is a different, valid file; then every tensor must still be readable.
      for (const auto& [name, tensor] : load_safetensors(file("f"))) tensor.to(at::kDouble).sum();
    } catch (const UserError&) { ++refused; }
  }
  EXPECT_GT(refused, static_cast<int64_t>(header_bytes) / 2);
}

TEST_F(Safetensors, RefusesWhatItCannotHold) {
  EXPECT_THROW(save_safetensors(file("x"), {{"__metadata__", torch::ones({1})}}), UserError);
  EXPECT_THROW(save_safetensors(file("x"), {{"x", at::Tensor()}}), UserError);
  EXPECT_THROW(save_safetensors(file("x"), {{"x", torch::ones({1}).to(at::kComplexDouble)}}), UserError);
  EXPECT_THROW(save_safetensors(file("x"), {{"\xff", torch::ones({1})}}), UserError);
  EXPECT_THROW(save_safetensors("/nonexistent/x", {{"x", torch::ones({1})}}), UserError);
  EXPECT_EQ(count_files(), 0u);
}

// A write that fails half-way (a full disk; here a file size limit) leaves the old file and no temporary one.
TEST_F(Safetensors, FailedWriteKeepsTheOldFile) {
  save_safetensors(file("a"), {{"x", torch::ones({4})}});
  // Made before the fork: the child has none of the OpenMP pool's threads, so a parallel operation there would wait for
  // ever.
  const TensorMap large = {{"x", torch::zeros({100000})}};
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit limit{4096, 4096};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      save_safetensors(file("a"), large);
    } catch (const UserError& error) {
      ::_exit(std::string(error.what()).find("File too large") != std::string::npos ? 7 : 8);
    }
    ::_exit(9);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(load_safetensors(file("a")).at("x").sum().item<float>(), 4.0f);
  EXPECT_EQ(count_files(), 1u);
}

}  // namespace
}  // namespace moegraft::io
