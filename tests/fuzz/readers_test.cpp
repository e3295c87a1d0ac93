// Readers over mutated files: weights, shards, pictures, configs, manifests, checkpoints. See harness.h; the readers
// that need no LibTorch are in text_readers_test.cpp.
#include "../support/paths.h"
#include "harness.h"
#include "libtorch.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/config/config.h"
#include "moegraft/convert/gguf.h"
#include "moegraft/data/manifest.h"
#include "moegraft/data/shard.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/rows.h"
#include "moegraft/model/weights.h"
#include "moegraft/run/run_config.h"

namespace moegraft::fuzz {
namespace {

TEST(Fuzz, Safetensors) {
  run({"shard.safetensors", {golden("data/shard.safetensors")}},
      [](const Scratch& dir, const std::string& text) { data::ShardSet(dir.write("s.safetensors", text)).validate(); });
}

TEST(Fuzz, Gguf) {
  run({"types.gguf", {golden("convert/types.gguf")}}, [](const Scratch& dir, const std::string& text) {
    const convert::GgufFile file(dir.write("t.gguf", text));
    for (const auto& name : file.names()) file.read(name);
  });
}

TEST(Fuzz, ConfigJson) {
  run({"config.json",
       {golden("model/qwen3/config.json"), golden("model/mixtral/config.json"), golden("model/olmoe/config.json"),
        golden("model/qwen3_yarn/config.json")}},
      [](const Scratch& dir, const std::string& text) {
        dir.write("config.json", text);
        model::read_spec(dir.path()).num_parameters();
      });
}

TEST(Fuzz, Pictures) {
  std::vector<std::string> seeds;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(test_source_dir()) / "tests/golden/io"))
    if (const auto e = entry.path().extension(); e != ".safetensors" && entry.file_size() < 100000) {
      const std::string bytes = golden("io/" + entry.path().filename().string());
      try {
        io::decode_image(bytes, "seed");
        seeds.push_back(bytes);
      } catch (const UserError&) {  // golden files of damaged pictures
      }
    }
  ASSERT_FALSE(seeds.empty());
  run({"pictures", seeds}, [](const Scratch&, const std::string& text) { io::decode_image(text, "picture"); });
}

TEST(Fuzz, RunConfig) {
  run({"run.yaml",
       {"run: { dir: r }\nmodel: { path: m }\nmodalities: { image: { codec: c } }\nadapters: [{ rank: 4, sites: [gate, "
        "q] }]\ndata: { train: [{ path: d, weight: 2 }] }\ntrain: { steps: 5, lora: { lr: 1.0e-3 } }\n"}},
      [](const Scratch&, const std::string& text) {
        config::dump(config::parse<run::RunConfig>(config::Document::from_string(text)));
      });
}

TEST(Fuzz, Manifest) {
  run({"manifest.jsonl",
       {"{\"text\": \"a\"}\n{\"segments\": [{\"text\": \"b\"}]}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"x\"}]}]}\n",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"what?\"}]}\n"}},
      [](const Scratch& dir, const std::string& text) {
        data::read_manifest(dir.write("m.jsonl", text), [](const std::string&) {});
      });
}

// Every document of a data set with all its pictures.
void read_set(const std::filesystem::path& path) {
  for (const auto& entry : data::read_manifest(path, [](const std::string&) {}))
    for (const auto& segment : entry.segments)
      if (segment.is_image()) segment.image.read();
}

TEST(Fuzz, DataSets) {
  std::vector<std::string> names{"shards-000001.tar", "set.tar.gz", "set.tar.zst"};
  if (io::reads_arrow())
    names.insert(names.end(), {"set.parquet", "chat.parquet", "stream.arrow", "file.arrow", "chat.arrow"});
  for (const auto& name : names)
    run({name.c_str(), {golden("data/sets/" + name)}},
        [&](const Scratch& dir, const std::string& text) { read_set(dir.write(name, text)); });
}

TEST(Fuzz, Vocabulary) {
  run({"vocabulary.json",
       {R"({"text_size": 100, "bos_id": 1, "eos_id": 2, "size": 118, "modalities": [{"name": "image", "modality": 1, "first_id": 100, "begin_id": 100, "end_id": 101, "num_codes": 16, "item_length": 4}]})"}},
      [](const Scratch& dir, const std::string& text) {
        dir.write("vocabulary.json", text);
        graft::read_vocabulary(dir.path());
      });
}

TEST(Fuzz, CheckpointManifestAndState) {
  const Scratch made;
  checkpoint::TrainState state;
  state.data_cursor = "{}";
  const auto whole = checkpoint::CheckpointWriter(made.path(), {1, 3, false, false})
                         .save(3, checkpoint::whole({{"a", at::ones({4})}}), checkpoint::whole({{"b", at::ones({4})}}),
                               checkpoint::to_json(state));
  run({"manifest.json", {io::read_file(whole / "manifest.json")}}, [&](const Scratch&, const std::string& text) {
    std::ofstream(whole / "manifest.json", std::ios::binary) << text;
    checkpoint::load(whole);
  });
  run({"state.json", {checkpoint::to_json(state)}},
      [&](const Scratch&, const std::string& text) { checkpoint::state_from_json(text); });
}

}  // namespace
}  // namespace moegraft::fuzz
