// What goes wrong on the command line ends with one line that helps, the right exit code, and soon: from troubles that
// users of such tools report, and from hostile files.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <fstream>

#include "libtorch.h"
#include "moegraft/data/shard.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/mapped_files.h"
#include "moegraft/io/safetensors.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;
using testing::TinyWorld;

const std::string kPointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4973345\n";

std::string nested(int64_t depth) { return std::string(size_t(depth), '[') + std::string(size_t(depth), ']'); }

void make_pipe(const fs::path& path) {
  fs::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
}

struct Case {
  const char* name;
  std::function<std::vector<std::string>(const TinyWorld&)> command;  // prepares what it needs
  const char* line;
  int code;
};

std::vector<std::string> inspect_config(const TinyWorld& w, const std::string& text) {
  io::write_file_atomic(w.base / "config.json", text);
  return {"inspect", w.base.string()};
}
std::vector<std::string> tokenize_changed(const TinyWorld& w, const std::function<void(io::Json&)>& change,
                                          const std::string& text = "a red disc") {
  auto j = io::read_json(w.tokenizer / "tokenizer.json");
  change(j);
  io::write_file_atomic(w.tokenizer / "tokenizer.json", j.dump());
  return {"tokenize", w.tokenizer.string(), "--text", text};
}
std::vector<std::string> train_with(const TinyWorld& w, const std::string& set) {
  return {"train", "-c", w.yaml.string(), "--set", set};
}
std::vector<std::string> generate_with(const TinyWorld& w, const std::vector<std::string>& options) {
  testing::write_run(w);
  std::vector<std::string> argv{"generate", w.run.string(), "--image", (w.dir / "o.png").string()};
  argv.insert(argv.end(), options.begin(), options.end());
  return argv;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> list{
      {"an id of the hub", [](const TinyWorld&) { return std::vector<std::string>{"inspect", "Qwen/Qwen3-30B-A3B"}; },
       "hf download Qwen/Qwen3-30B-A3B", 1},
      {"a folder of the hub's cache",
       [](const TinyWorld& w) {
         const fs::path cache = w.dir / "models--a--b";
         for (const char* hash : {"0123", "4567", "89ab"}) fs::create_directories(cache / "snapshots" / hash);
         fs::create_directories(cache / "refs");
         io::write_file_atomic(cache / "refs/main", "4567\n");
         return std::vector<std::string>{"inspect", cache.string()};
       },
       "models--a--b/snapshots/4567", 1},
      {"an id of the hub in a config",
       [](const TinyWorld& w) { return train_with(w, "model.path=Qwen/Qwen3-30B-A3B"); },
       "hf download Qwen/Qwen3-30B-A3B --local-dir models/Qwen3-30B-A3B", 1},
      {"a git-lfs pointer as config", [](const TinyWorld& w) { return inspect_config(w, kPointer); }, "git lfs pull",
       1},
      {"a git-lfs pointer as weights",
       [](const TinyWorld& w) {
         io::write_file_atomic(w.base / "model.safetensors", kPointer);
         return train_with(w, "train.steps=1");
       },
       "git lfs pull", 1},
      {"a manifest as data",
       [](const TinyWorld& w) { return train_with(w, "data.train[0].path=" + w.manifest.string()); },
       "data prepare shards --manifest", 1},
      {"a family that is not known", [](const TinyWorld& w) { return inspect_config(w, R"({"model_type": "gpt2"})"); },
       "'gpt2' is not a supported family; supported: dots1, llama, ", 1},
      {"experts to keep elsewhere of a dense model",
       [](const TinyWorld& w) {
         testing::make_tiny_world(w.dir / "dense", {"llama"});
         return std::vector<std::string>{"train",
                                         "-c",
                                         w.yaml.string(),
                                         "--set",
                                         "model.path=" + (w.dir / "dense/base").string(),
                                         "--set",
                                         "model.offload=experts"};
       },
       "is a dense model (llama): it has no experts to keep elsewhere; use model.offload: none", 2},
      {"a variable that is not set",
       [](const TinyWorld& w) { return train_with(w, "run.dir=$MOEGRAFT_NO_SUCH_VARIABLE/x"); },
       "MOEGRAFT_NO_SUCH_VARIABLE is not set", 2},
      {"a variable that is not set, on the command line",
       [](const TinyWorld&) { return std::vector<std::string>{"inspect", "${MOEGRAFT_NO_SUCH_VARIABLE}/x"}; },
       "path: the environment variable MOEGRAFT_NO_SUCH_VARIABLE is not set", 2},
      {"a variable that is not set, of a dry run",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"inspect", "-c", w.yaml.string(), "--set",
                                         "model.path=$MOEGRAFT_NO_SUCH_VARIABLE/x"};
       },
       "MOEGRAFT_NO_SUCH_VARIABLE is not set", 2},
      {"a command that is not known", [](const TinyWorld&) { return std::vector<std::string>{"trian", "-c", "x"}; },
       "unknown command trian of moegraft; did you mean train?", 2},
      {"a command of a command", [](const TinyWorld&) { return std::vector<std::string>{"data", "prepair"}; },
       "unknown command prepair of moegraft data; did you mean prepare?", 2},
      {"no command at all like it", [](const TinyWorld&) { return std::vector<std::string>{"transmogrify"}; },
       "expected one of train, config, generate, ", 2},
      {"an option that is not known",
       [](const TinyWorld& w) { return std::vector<std::string>{"train", "--confg=" + w.yaml.string()}; },
       "unknown option --confg of moegraft train; did you mean --config?", 2},
      {"an option that has moved", [](const TinyWorld&) { return std::vector<std::string>{"train", "--keys"}; },
       "--keys is now a command: moegraft config train", 2},
      {"an option of no command",
       [](const TinyWorld& w) { return std::vector<std::string>{"train", "-c", w.yaml.string(), "-q"}; },
       "unknown option -q of moegraft train; see moegraft train --help", 2},
      {"an argument too many",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "b", "--ids", "x", "-o", "y"};
       },
       "unknown argument b of moegraft logits", 2},
      {"an argument that a list took",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", "--text", w.text_shards.string(), w.base.string(), "--drift"};
       },
       "give model first", 2},
      {"launch's option",
       [](const TinyWorld&) { return std::vector<std::string>{"launch", "--nprco", "2", "--", "train"}; },
       "unknown option --nprco of moegraft launch; did you mean --nproc?", 2},
      {"an option without its command's name",
       [](const TinyWorld&) { return std::vector<std::string>{"data", "prepare", "emoji"}; },
       "is required; see moegraft data prepare emoji --help", 2},
      {"a path where data sources belong", [](const TinyWorld& w) { return train_with(w, "data.train=shards/a"); },
       "data.train must be a list, got shards/a (write [{ path: shards/a }])", 2},
      {"a list of paths", [](const TinyWorld& w) { return train_with(w, "data.train=[shards/a]"); },
       "got shards/a (write { path: shards/a })", 2},
      {"a merge of YAML", [](const TinyWorld& w) { return train_with(w, "train.lora={<<: {lr: 1}}"); },
       "write its keys out", 2},
      {"another user's home", [](const TinyWorld& w) { return train_with(w, "run.dir=~nobody/x"); }, "only ~ and ~/",
       2},
      {"a codec that is there",
       [](const TinyWorld& w) {
         io::write_file_atomic(w.dir / "codec.yaml", "dir: " + w.codec.string() + "\ndata: { train: [{ path: " +
                                                         w.manifest.string() + " }] }\n");
         io::write_file_atomic(w.codec / "codec.yaml", "");
         return std::vector<std::string>{"codec", "train", "-c", (w.dir / "codec.yaml").string()};
       },
       "--overwrite", 2},
      {"a config nested deep",
       [](const TinyWorld& w) {
         return inspect_config(w, "{\"model_type\": \"qwen3_moe\", \"vocab_size\": " + nested(100000) + "}");
       },
       "brackets nest 100001 deep", 1},
      {"a number out of range",
       [](const TinyWorld& w) { return inspect_config(w, R"({"model_type": "qwen3_moe", "rms_norm_eps": 1e999})"); },
       "config.json: not valid JSON", 1},
      {"more parameters than there can be",
       [](const TinyWorld& w) {
         auto j = io::read_json(w.base / "config.json");
         j["vocab_size"] = 2000000000, j["hidden_size"] = 2000000000;
         return inspect_config(w, j.dump());
       },
       "fewer than 1e15", 1},
      {"a colour in a name",
       [](const TinyWorld& w) { return inspect_config(w, R"({"model_type": "\u001b[31mred\nnew line"})"); },
       "\\x1b[31mred\\nnew line", 1},
      {"a pipe as config",
       [](const TinyWorld& w) {
         make_pipe(w.base / "config.json");
         return std::vector<std::string>{"inspect", w.base.string()};
       },
       "it is a pipe or a device", 1},
      {"a pipe as weights",
       [](const TinyWorld& w) {
         make_pipe(w.base / "model.safetensors");
         io::save_safetensors(w.dir / "ids.safetensors", {{"input_ids", at::ones({1, 4}, at::kLong)}});
         return std::vector<std::string>{"logits", w.base.string(),       "--ids", (w.dir / "ids.safetensors").string(),
                                         "-o",     (w.dir / "o").string()};
       },
       "not a regular file", 1},
      {"a device as config",
       [](const TinyWorld& w) {
         fs::remove(w.base / "config.json");
         fs::create_symlink("/dev/zero", w.base / "config.json");
         return std::vector<std::string>{"inspect", w.base.string()};
       },
       "it is a pipe or a device", 1},
      {"no ids",
       [](const TinyWorld& w) {
         io::save_safetensors(w.dir / "ids.safetensors", {{"input_ids", at::ones({4, 0}, at::kLong)}});
         return std::vector<std::string>{"logits", w.base.string(),       "--ids", (w.dir / "ids.safetensors").string(),
                                         "-o",     (w.dir / "o").string()};
       },
       "input_ids is empty", 1},
      {"an id outside the vocabulary",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(),       "--ids", "1,2,99999999",
                                         "-o",     (w.dir / "o").string()};
       },
       "token id 99999999 is outside the vocabulary", 1},
      {"ids that are none",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "--ids", ", ,", "-o", (w.dir / "o").string()};
       },
       "--ids must be ids such as 1,2,3", 2},
      {"an id below 0",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "--ids", "1,-1", "-o", (w.dir / "x").string()};
       },
       "each from 0 up, got 1,-1", 2},
      {"half an id",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "--ids", "1.5", "-o", (w.dir / "x").string()};
       },
       "each from 0 up, got 1.5", 2},
      {"weights as an output",
       [](const TinyWorld& w) {
         return std::vector<std::string>{
             "logits", w.base.string(), "--ids", "1,2", "-o", (w.base / "model.safetensors").string()};
       },
       "exists and holds no logits; give another file", 2},
      {"one file to write and to compare with",
       [](const TinyWorld& w) {
         const std::string file = (w.base / "model.safetensors").string();
         return std::vector<std::string>{"logits", w.base.string(), "--ids", "1,2", "-o", file, "--against", file};
       },
       "-o and --against are the same file", 2},
      {"a config as an evaluation's output",
       [](const TinyWorld& w) {
         return std::vector<std::string>{
             "eval", w.base.string(), "--text", w.text_shards.string(), "-o", (w.base / "config.json").string()};
       },
       "is no result of moegraft eval; give another file", 1},
      {"a number of prompts for nothing",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", w.base.string(), "--text", w.text_shards.string(), "--n", "5"};
       },
       "--n is for --retrieval or --ranking: give that too", 2},
      {"a negative temperature",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", w.base.string(), "--retrieval", "m.jsonl", "--temperature", "-1"};
       },
       "must be a number, 0 or more, got -1", 2},
      {"no prompts",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", w.base.string(), "--retrieval", "m.jsonl", "--n", "0"};
       },
       "must be a number, above 0, got 0", 2},
      {"a checkpoint of a model",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(),        "--ids",        "1,2",
                                         "-o",     (w.dir / "o").string(), "--checkpoint", "7"};
       },
       "is a model, not a run: it has no checkpoint", 2},
      {"a sheet that is a folder",
       [](const TinyWorld& w) {
         testing::write_run(w);
         return std::vector<std::string>{"eval",    w.run.string(), "--retrieval", w.manifest.string(),
                                         "--sheet", w.dir.string()};
       },
       "is a folder; give a file, such as sheet.png", 2},
      {"a baseline's pictures that are not there",
       [](const TinyWorld& w) {
         testing::write_run(w);
         return std::vector<std::string>{"eval",        w.run.string(),
                                         "--retrieval", w.manifest.string(),
                                         "--baselines", (w.dir / "none.jsonl").string()};
       },
       "baselines.manifest: ", 1},
      {"a packing of no text",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", w.base.string(), "--set", "text.packing=documents"};
       },
       "text.shards must name at least one", 2},
      {"a run in its base's folder",
       [](const TinyWorld& w) { return train_with(w, "run.dir=" + (w.base / "run").string()); },
       "is the base's own folder or lies in it: name another folder", 2},
      {"text of another tokenizer",
       [](const TinyWorld& w) {
         data::ShardWriter shards(w.dir / "other", {{{"text", 100, 0}}}, false, 1 << 20,
                                  {{"fingerprint.tokenizer", "0123456789abcdef"}});
         const std::vector<int32_t> ids(20, 7);
         shards.add({{0, ids}});
         shards.finish();
         return std::vector<std::string>{"eval", w.base.string(), "--text", (w.dir / "other").string()};
       },
       "was made with another tokenizer than the model's (fingerprint 0123456789abcdef", 1},
      {"a modality that the config lacks",
       [](const TinyWorld& w) {
         data::ShardWriter shards(w.dir / "sketches", {{{"text", 100, 0}, {"image", 16, 4}, {"sketch", 8, 4, 2}}});
         const std::vector<int32_t> codes{0, 4, 3, 7};
         shards.add({{2, codes}});
         shards.finish();
         return train_with(w, "data.train[0].path=" + (w.dir / "sketches").string());
       },
       "holds the modality \"sketch\", which `modalities` lacks (image): add modalities.sketch with the codec that "
       "made it",
       2},
      {"a codec without a name",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"data",
                                         "prepare",
                                         "shards",
                                         "--manifest",
                                         w.manifest.string(),
                                         "--tokenizer",
                                         w.base.string(),
                                         "--codec",
                                         w.codec.string(),
                                         "--codec-of",
                                         w.codec.string(),
                                         "-o",
                                         (w.dir / "s").string()};
       },
       "--codec-of must be NAME=DIR, such as sketch=models/sketch, got ", 2},
      {"pictures as text",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"eval", w.base.string(), "--text", w.image_shards.string()};
       },
       "holds other modalities too; give shards of text alone", 1},
      {"noise without end",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"upcycle",  w.base.string(), "-o",      (w.dir / "u").string(),
                                         "--method", "clone",         "--noise", "inf"};
       },
       "--noise must be in [0, 10], got inf", 2},
      {"synonyms that are a folder",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"data",       "prepare",     "emoji", "-o", (w.dir / "e").string(),
                                         "--synonyms", w.dir.string()};
       },
       "file of synonyms not found", 2},
      {"an id beyond 64 bits",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(),       "--ids", "1,99999999999999999999",
                                         "-o",     (w.dir / "o").string()};
       },
       "--ids: a number is out of range", 2},
      {"a codec's index that leads out",
       [](const TinyWorld& w) {
         fs::remove(w.codec / "model.safetensors");
         io::write_json(w.codec / "model.safetensors.index.json",
                        {{"weight_map", {{"a", "../base/model.safetensors"}}}});
         return std::vector<std::string>{"codec", "decode", w.codec.string(), "--ids", "x", "-o", "y.png"};
       },
       "must be a file beside the index", 1},
      {"a tokenizer nested deep",
       [](const TinyWorld& w) {
         return tokenize_changed(w, [](io::Json& j) {
           io::Json n{{"type", "NFC"}};
           for (int i = 0; i < 200; ++i) n = {{"type", "Sequence"}, {"normalizers", {n}}};
           j["normalizer"] = n;
         });
       },
       "deep, expected 100 at most", 1},
      {"a text that grows without end",
       [](const TinyWorld& w) {
         return tokenize_changed(w, [](io::Json& j) {
           io::Json list = io::Json::array();
           for (int i = 0; i < 9; ++i)
             list.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aaaaaaaaaa"}});
           j["normalizer"] = {{"type", "Sequence"}, {"normalizers", list}};
         });
       },
       "steps of tokenizer.json that add to it multiply each other", 1},
      {"a regular expression that takes for ever",
       [](const TinyWorld& w) {
         return tokenize_changed(
             w,
             [](io::Json& j) {
               j["pre_tokenizer"] = {{"type", "Split"},
                                     {"pattern", {{"Regex", "(?:a?){60}a{60}"}}},
                                     {"behavior", "Isolated"},
                                     {"invert", false}};
             },
             std::string(60, 'a'));
       },
       "takes too long", 1},
      {"a verb in a regular expression",
       [](const TinyWorld& w) {
         return tokenize_changed(w, [](io::Json& j) {
           j["pre_tokenizer"] = {{"type", "Split"},
                                 {"pattern", {{"Regex", "(*NO_JIT)(a+)+$"}}},
                                 {"behavior", "Isolated"},
                                 {"invert", false}};
         });
       },
       "a verb (*...)", 1},
      {"half characters",
       [](const TinyWorld& w) {
         return tokenize_changed(w, [](io::Json& j) {
           j["pre_tokenizer"] = {
               {"type", "Split"}, {"pattern", {{"Regex", "\\C\\K"}}}, {"behavior", "Isolated"}, {"invert", false}};
         });
       },
       "does not compile", 1},
      {"a vocabulary of terabytes",
       [](const TinyWorld& w) {
         testing::write_run(w);
         auto j = io::read_json(w.run / "vocabulary.json");
         j["modalities"][0]["num_codes"] = 400000000000;
         io::write_json(w.run / "vocabulary.json", j);
         return std::vector<std::string>{"generate", w.run.string(), "--prompt", "a", "--image", "o.png"};
       },
       "vocabulary.json: image: num_codes or item_length is out of range", 1},
      {"no process",
       [](const TinyWorld&) { return std::vector<std::string>{"launch", "--nproc", "0", "tokenize", "x"}; },
       "--nproc: Value 0 not in range 1 to 4096; see moegraft launch --help", 2},
      {"a number of processes that is none",
       [](const TinyWorld&) { return std::vector<std::string>{"launch", "--nproc", "x", "--", "tokenize", "x"}; },
       "--nproc: Value x not in range 1 to 4096", 2},
      {"a port beyond the last",
       [](const TinyWorld&) {
         return std::vector<std::string>{"launch", "--nproc", "1", "--master-port", "70000", "tokenize"};
       },
       "--master-port: Value 70000 not in range 0 to 65535", 2},
      {"fewer restarts than none",
       [](const TinyWorld&) {
         return std::vector<std::string>{"launch", "--nproc", "1", "--max-restarts", "-1", "tokenize"};
       },
       "--max-restarts: must be a number, 0 or more, got -1", 2},
      {"launch's option behind the command",
       [](const TinyWorld&) { return std::vector<std::string>{"launch", "tokenize", "--nproc", "1"}; },
       "--nproc N, from 1 to 4096, must be given before the command", 2},
      {"a short word like nothing", [](const TinyWorld&) { return std::vector<std::string>{"foo"}; },
       "unknown command foo of moegraft; expected one of train, ", 2},
      {"a short key like nothing", [](const TinyWorld& w) { return train_with(w, "foo=3"); },
       "foo is not a known key; ", 2},
      {"nothing to resume from",
       [](const TinyWorld& w) { return std::vector<std::string>{"train", "-c", w.yaml.string(), "--resume", ""}; },
       "--resume is empty: give none, auto or a checkpoint directory", 2},
      {"more pictures than anyone wants",
       [](const TinyWorld& w) { return generate_with(w, {"--prompt", "a", "--n", "99999999999"}); },
       "--n: Value 99999999999 not in range 1 to 1000000", 2},
      {"fewer columns than none",
       [](const TinyWorld& w) { return generate_with(w, {"--prompt", "a", "--columns", "-2"}); },
       "--columns: Value -2 not in range 0 to 1000", 2},
      {"a seed below 0", [](const TinyWorld& w) { return generate_with(w, {"--prompt", "a", "--seed", "-1"}); },
       "--seed: must be a number, 0 or more, got -1", 2},
      {"prompts that are a folder", [](const TinyWorld& w) { return generate_with(w, {"--prompts", w.dir.string()}); },
       "is a folder; give a file with a prompt a line", 2},
      {"a mistyped picture in a prompt",
       [](const TinyWorld& w) {
         return generate_with(w, {"--prompt", "a <imag:x.png>", "--with-image", "/nowhere.png"});
       },
       "the prompt holds <imag:x.png> as text: a picture is written <image:picture.png>", 1},
      {"a picture in a prompt without its end",
       [](const TinyWorld& w) {
         return generate_with(w, {"--prompt", "a <image:x.png", "--with-image", "/nowhere.png"});
       },
       "the prompt holds <image:x.png as text", 1},
      {"a variable in a prompt's picture that is not set",
       [](const TinyWorld& w) { return generate_with(w, {"--prompt", "<image:$MOEGRAFT_NO_SUCH_VARIABLE/x.png>"}); },
       "the environment variable MOEGRAFT_NO_SUCH_VARIABLE is not set", 2},
      {"a checkpoint that is not there",
       [](const TinyWorld& w) { return generate_with(w, {"--prompt", "a", "--checkpoint", "21"}); },
       "no checkpoint '21' in ", 1},
      {"the checkpoints that there are",
       [](const TinyWorld& w) { return generate_with(w, {"--prompt", "a", "--checkpoint", "21"}); },
       ": it holds step-00000000", 1},
      {"an id that is missing",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "--ids", "1,,2", "-o", (w.dir / "o").string()};
       },
       "--ids must be ids such as 1,2,3, each from 0 up, got 1,,2", 2},
      {"an id that is missing at the end",
       [](const TinyWorld& w) {
         return std::vector<std::string>{"logits", w.base.string(), "--ids", "1,2,", "-o", (w.dir / "o").string()};
       },
       "--ids must be ids such as 1,2,3", 2},
      {"logits that are no numbers",
       [](const TinyWorld& w) {
         io::save_safetensors(w.dir / "nan.safetensors", {{"logits", at::full({1, 2, 300}, NAN)}});
         return std::vector<std::string>{"logits", w.base.string(), "--ids",
                                         "1,2",    "--against",     (w.dir / "nan.safetensors").string()};
       },
       "nan.safetensors: its logits are not all finite", 1},
      {"something else where ids are written",
       [](const TinyWorld& w) {
         return std::vector<std::string>{
             "codec", "encode", w.codec.string(), "--image", "x.png", "-o", (w.base / "config.json").string()};
       },
       "config.json exists and holds no ids; give another file or remove it", 2},
      {"a file beside an earlier codec",
       [](const TinyWorld& w) {
         io::write_file_atomic(w.dir / "codec.yaml", "dir: " + w.codec.string() + "\ndata: { train: [{ path: " +
                                                         w.manifest.string() + " }] }\n");
         io::write_file_atomic(w.codec / "codec.yaml", "");
         io::write_file_atomic(w.codec / "notes.txt", "mine");
         return std::vector<std::string>{"codec", "train", "-c", (w.dir / "codec.yaml").string(), "--overwrite"};
       },
       "holds notes.txt, which no training wrote and --overwrite would remove", 2},
      {"a run without a whole checkpoint",
       [](const TinyWorld& w) {
         testing::write_run(w);
         for (const auto& dir : fs::directory_iterator(w.run / "checkpoints")) fs::remove(dir.path() / "manifest.json");
         return std::vector<std::string>{"generate", w.run.string(), "--prompt", "a", "--image", "o.png"};
       },
       "every checkpoint in", 1},
  };
  return list;
}

TEST(Messages, OneLineThatHelpsAndSoon) {
  testing::TemporaryFolder folder;
  const TinyWorld made = testing::make_tiny_world(folder / "made");
  for (const auto& c : cases()) {
    SCOPED_TRACE(c.name);
    // In place, since the config names it by its path.
    const auto kept = folder / "kept";
    fs::copy(made.dir, kept, fs::copy_options::recursive);
    const auto begin = std::chrono::steady_clock::now();
    const auto r = testing::run_moegraft(c.command(made));
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
    EXPECT_EQ(r.code, c.code) << r.err;
    EXPECT_NE(r.err.find(c.line), std::string::npos) << r.err;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n') - (r.err.find("warning") != std::string::npos), 1) << r.err;
    fs::remove_all(made.dir);
    fs::rename(kept, made.dir);
  }
}

// The same path in a config, in an override and on the command line, of every command that reads one.
TEST(Messages, PathsKnowHomeAndVariables) {
  testing::TemporaryFolder folder;
  const TinyWorld w = testing::make_tiny_world(folder / "made");
  const std::string base = fs::relative(w.base, w.dir).string(), codec = fs::relative(w.codec, w.dir).string();
  testing::write_run(w);
  const auto picture = *fs::directory_iterator(w.manifest.parent_path() / "images");
  const std::vector<std::vector<std::string>> commands = {
      {"generate", w.run.string(), "--prompt",
       "like <image:$WORLD/" + fs::relative(picture.path(), w.dir).string() + ">", "--image",
       (folder / "o.png").string()},
      {"inspect", "$WORLD/" + base},
      {"inspect", "~/" + base},
      {"inspect", "-c", "${WORLD}/" + fs::relative(w.yaml, w.dir).string(), "--set", "model.path=~/" + base},
      {"codec", "eval", "~/" + codec, "--images", "$WORLD/" + fs::relative(w.manifest, w.dir).string()},
      {"eval", "~/" + base, "--set", "text={shards: [$WORLD/" + fs::relative(w.text_shards, w.dir).string() + "]}"},
      {"train", "-c", w.yaml.string(), "--set", "run.dir=~/$NAME", "--set", "train.steps=1"},
  };
  for (const auto& command : commands) {
    std::vector<std::string> argv{testing::moegraft_binary().string()};
    argv.insert(argv.end(), command.begin(), command.end());
    testing::Process process(argv, {"HOME=" + w.dir.string(), "WORLD=" + w.dir.string(), "NAME=expanded"});
    const auto r = process.wait();
    EXPECT_EQ(r.code, 0) << command.front() << ": " << r.err;
    EXPECT_NE(r.err.find(" is " + w.dir.string()), std::string::npos) << "what a path became is shown: " << r.err;
  }
  EXPECT_TRUE(fs::exists(w.dir / "expanded/run.json"));
}

// Linear in the tensors: quadratic took 29 s of 40,000.
TEST(Messages, ManyTensorsOpenSoon) {
  testing::TemporaryFolder folder;
  std::string header = "{";
  constexpr int64_t kTensors = 100000;
  for (int64_t i = 0; i < kTensors; ++i)
    header += (i ? ",\"t" : "\"t") + std::to_string(i) + R"(":{"dtype":"U8","shape":[1],"data_offsets":[)" +
              std::to_string(i) + "," + std::to_string(i + 1) + "]}";
  header += "}";
  const uint64_t size = header.size();
  std::ofstream(folder / "many.safetensors", std::ios::binary)
      << std::string(reinterpret_cast<const char*>(&size), 8) << header << std::string(kTensors, '\1');
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(io::SafetensorsFile(folder / "many.safetensors").names().size(), size_t(kTensors));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

// The file that a running training maps is cut: named, instead of a death by signal.
TEST(Messages, AFileThatIsCutWhileInUse) {
  testing::TemporaryFolder folder;
  io::save_safetensors(folder / "big.safetensors", {{"w", at::ones({1 << 20})}});
  EXPECT_EXIT(
      {
        io::name_file_on_bus_error();
        const io::SafetensorsFile file(folder / "big.safetensors");
        const at::Tensor w = file.tensor("w");
        fs::resize_file(folder / "big.safetensors", 4096);
        volatile float x = w.const_data_ptr<float>()[(1 << 20) - 1];
        static_cast<void>(x);
      },
      ::testing::ExitedWithCode(1), "big.safetensors was cut short");
}

}  // namespace
}  // namespace moegraft
