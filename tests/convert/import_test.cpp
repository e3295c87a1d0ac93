// GGUF against what the gguf package and Hugging Face's own files say (tests/golden/make_convert.py).
#include <gtest/gtest.h>

#include <fstream>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/convert/gguf.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::convert {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/convert";
const char* const kCases[] = {"llama", "llama_linear", "mistral", "mixtral", "qwen3", "qwen3_moe", "olmoe"};

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "moegraft_convert_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
  fs::path path;
};

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const UserError& e) { return e.what(); }
  return "no error";
}

TEST(Gguf, EveryTypeGivesThePackagesValues) {
  const GgufFile file(kGolden / "types.gguf");
  const auto expected = io::load_safetensors(kGolden / "types.safetensors");
  ASSERT_EQ(file.names().size(), gguf_types().size());
  for (const auto& [name, values] : expected)
    EXPECT_TRUE(file.read(name).view(at::kInt).equal(values.view(at::kInt))) << name;
}

// Q8_0 rounds to 1/254 of a block's largest value; the other types of these files hold bf16 numbers exactly, float16
// but for its smallest.
double tolerance(const std::string& dtype) { return dtype == "Q8_0" ? 0.5 / 127 : dtype == "F16" ? 1e-7 : 0; }

TEST(ImportGguf, TensorsConfigAndIdsAreHuggingFaces) {
  for (const std::string name : kCases) {
    SCOPED_TRACE(name);
    const Folder out;
    const auto golden = io::read_json(kGolden / (name + ".json"));
    import_gguf(kGolden / (name + ".gguf"), out.path / "model", {.dtype = at::kFloat});

    const auto expected = io::load_safetensors(kGolden / (name + ".safetensors")),
               tensors = io::load_safetensors(out.path / "model/model.safetensors");
    for (const auto& [key, value] : expected) {
      ASSERT_TRUE(tensors.contains(key)) << key;
      const at::Tensor wide = value.to(at::kFloat);
      EXPECT_LE((tensors.at(key) - wide).abs().max().item<double>(),
                tolerance(golden["dtype"]) * std::max(1.0, wide.abs().max().item<double>()))
          << key;
    }
    EXPECT_EQ(tensors.size(), expected.size());

    const auto config = io::read_json(out.path / "model/config.json");
    for (const auto& [key, value] : golden["config"].items())
      EXPECT_EQ(config.contains(key) ? config[key] : io::Json(nullptr), value) << key;

    const auto tokenizer = tokenizer::load_tokenizer(out.path / "model");
    for (size_t i = 0; i < golden["texts"].size(); ++i) {
      const auto text = golden["texts"][i].get<std::string>();
      EXPECT_EQ(tokenizer->encode(text), golden["ids"][i].get<std::vector<int64_t>>()) << text;
    }
  }
}

TEST(ImportGguf, SeveralFilesHoldTheSameTensors) {
  const Folder out;
  import_gguf(kGolden / "olmoe.gguf", out.path / "one", {.dtype = at::kFloat});
  import_gguf(kGolden / "olmoe.gguf", out.path / "many", {.dtype = at::kFloat, .max_shard_bytes = 100000});
  const auto one = io::load_safetensors(out.path / "one/model.safetensors");
  const auto index = io::read_json(out.path / "many/model.safetensors.index.json");
  std::map<std::string, io::TensorMap> files;
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (!files.contains(file)) files[file] = io::load_safetensors(out.path / "many" / file.get<std::string>());
    EXPECT_TRUE(files.at(file).at(name).equal(one.at(name))) << name;
  }
  EXPECT_GT(files.size(), 2u);
  EXPECT_EQ(index["weight_map"].size(), one.size());
}

// Bytes of a GGUF file, put together by hand.
struct Bytes {
  std::string text = "GGUF";
  template <class T>
  Bytes& number(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& string(const std::string& s) {
    number<uint64_t>(s.size());
    text += s;
    return *this;
  }
  Bytes& header(uint64_t tensors, uint64_t keys) {
    return number<uint32_t>(3).number<uint64_t>(tensors).number<uint64_t>(keys);
  }
  Bytes& key(const std::string& name, const std::string& value) {
    return string(name).number<uint32_t>(8).string(value);
  }
};

TEST(Gguf, DamagedAndForeignFilesAreRefusedInOneLine) {
  const std::string whole = io::read_file(kGolden / "llama.gguf");
  struct Case {
    const char* name;
    std::string bytes, message;
  };
  const auto tensor = [](std::vector<uint64_t> sizes, uint32_t type, uint64_t offset) {
    Bytes b;
    b.header(1, 0).string("a").number<uint32_t>(uint32_t(sizes.size()));
    for (const uint64_t size : sizes) b.number(size);
    return b.number(type).number(offset).text + std::string(256, '\0');
  };
  const std::vector<Case> cases{
      {"empty", "", "does not begin with \"GGUF\""},
      {"another format", "PK\3\4 a zip file", "does not begin with \"GGUF\""},
      {"magic alone", "GGUF", "truncated or damaged"},
      {"version 1", Bytes().number<uint32_t>(1).text + std::string(64, '\0'), "version must be 2 or 3"},
      {"big-endian", Bytes().number<uint32_t>(0x03000000).text + std::string(64, '\0'), "version must be 2 or 3"},
      {"half of it", whole.substr(0, whole.size() / 2), "truncated"},
      {"one byte less", whole.substr(0, whole.size() - 40), "truncated"},
      {"keys that are not there", Bytes().header(0, 1000).text, "truncated or damaged"},
      {"a string of 2^60 bytes", Bytes().header(0, 1).number<uint64_t>(uint64_t{1} << 60).text, "truncated or damaged"},
      {"an array of 2^60 numbers",
       Bytes()
           .header(0, 1)
           .string("k")
           .number<uint32_t>(9)
           .number<uint32_t>(4)
           .number<uint64_t>(uint64_t{1} << 60)
           .text,
       "more than the file holds"},
      {"an array of arrays",
       Bytes().header(0, 1).string("k").number<uint32_t>(9).number<uint32_t>(9).number<uint64_t>(1).text,
       "array of arrays"},
      {"an unknown value type", Bytes().header(0, 1).string("k").number<uint32_t>(99).text, "unknown type 99"},
      {"a key twice", Bytes().header(0, 2).key("k", "a").key("k", "b").text, "is there twice"},
      {"five dimensions", tensor({1, 1, 1, 1, 1}, 0, 0), "5 dimensions"},
      {"no dimension", tensor({}, 0, 0), "0 dimensions"},
      {"a size of zero", tensor({0}, 0, 0), "impossible size"},
      {"sizes that overflow", tensor({uint64_t{1} << 40, uint64_t{1} << 40}, 0, 0), "impossible size"},
      {"rows off the block", tensor({33}, 8, 0), "no multiple of Q8_0's 32"},
      {"beyond the end", tensor({4096}, 0, 0), "beyond the file's"},
      {"an offset beyond the end", tensor({1}, 0, uint64_t{1} << 62), "beyond the file's"},
  };
  const Folder out;
  for (const auto& c : cases) {
    std::ofstream(out.path / "f.gguf", std::ios::binary) << c.bytes;
    const std::string error = error_of([&] { GgufFile(out.path / "f.gguf"); });
    EXPECT_NE(error.find(c.message), std::string::npos) << c.name << ": " << error;
    EXPECT_NE(error.find("f.gguf"), std::string::npos) << c.name << ": " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << c.name;
  }
  EXPECT_NE(error_of([&] { GgufFile(out.path); }).find("not a regular file"), std::string::npos);
}

TEST(ImportGguf, WhatCannotBeImportedIsNamed) {
  const std::string whole = io::read_file(kGolden / "llama.gguf");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string bytes = whole;
    for (size_t at = bytes.find(from); at != std::string::npos; at = bytes.find(from, at + to.size()))
      bytes.replace(at, from.size(), to);
    return bytes;
  };
  const auto with_type = [&](const std::string& tensor,
                             char type) {  // of two dimensions: name, u32 2, u64 sizes, u32 type
    std::string bytes = whole;
    bytes[bytes.find(tensor) + tensor.size() + 4 + 2 * 8] = type;
    return bytes;
  };
  struct Case {
    const char* name;
    std::string bytes, message;
  };
  const std::vector<Case> cases{
      {"half of the file", whole.substr(0, whole.size() / 2), "truncated"},
      {"type", with_type("blk.0.ffn_up.weight", 16),
       "blk.0.ffn_up.weight has type 16, which cannot be read; known: F32"},
      {"architecture", with("llama", "gemma"),
       "architecture \"gemma\" cannot be imported; known: llama, llama with experts, olmoe with experts"},
      {"pre-tokenizer", with("smollm", "tekken"),
       "tokenizer.ggml.pre \"tekken\" is not known here; known: gpt-2, smollm"},
      {"tokenizer", with("gpt2", "bert"), "tokenizer.ggml.model \"bert\" is not known here"},
      {"a missing tensor", with("blk.1.ffn_up.weight", "blk.9.ffn_up.weight"), "blk.1.ffn_up.weight is missing"},
      {"a missing key", with("llama.context_length", "llama.kontext_length"), "llama.context_length is missing"},
  };
  const Folder out;
  for (const auto& c : cases) {
    std::ofstream(out.path / "f.gguf", std::ios::binary) << c.bytes;
    const std::string error = error_of([&] { import_gguf(out.path / "f.gguf", out.path / "model"); });
    EXPECT_NE(error.find(c.message), std::string::npos) << c.name << ": " << error;
    EXPECT_FALSE(fs::exists(out.path / "model")) << c.name;
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(out.path), {}), 1) << "a refused import leaves files behind";
  fs::create_directory(out.path / "used");
  std::ofstream(out.path / "used/file") << "mine";
  EXPECT_THROW(import_gguf(kGolden / "llama.gguf", out.path / "used"), UsageError);
  EXPECT_EQ(io::read_file(out.path / "used/file"), "mine");
}

}  // namespace
}  // namespace moegraft::convert
