#include "moegraft/config/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "moegraft/config/shared_choices.h"

namespace moegraft::config {
namespace {

enum class Kind { modality_lora, mixture };
struct KindRow {
  Kind value;
  const char *name, *meaning;
  bool routed;
};
constexpr KindRow kKinds[] = {{Kind::modality_lora, "modality_lora", "Gated.", false},
                              {Kind::mixture, "mixture", "", true}};
constexpr std::span<const KindRow> choices_of(Kind) { return kKinds; }

struct Group {
  double lr = 1e-4;
  template <class V>
  void visit_fields(V& v) {
    v("lr", lr, range(0.0, 10.0), "Peak learning rate.");
  }
};

struct Init {
  std::string family = "olmoe";
  std::string tokenizer;
  template <class V>
  void visit_fields(V& v) {
    v("family", family, one_of({"olmoe", "mixtral"}), "Layout.");
    v("tokenizer", tokenizer, required(), "Folder of the tokenizer.");
  }
};

struct Adapter {
  Kind kind = Kind::modality_lora;
  int64_t rank = 16;
  std::vector<std::string> sites = {"gate", "up"};
  std::vector<int64_t> layers;
  template <class V>
  void visit_fields(V& v) {
    v("kind", kind, any(), "Kind.");
    v("rank", rank, range(1, 1024), "LoRA rank P.");
    v("sites", sites, one_of({"gate", "up", "down", "q"}), "Where it acts.");
    v("layers", layers, range(0, 100), "Layer indices.");
  }
};

struct Train {
  int64_t steps = 1000;
  std::string schedule = "cosine";
  bool flag = false;
  double clip = 1.0;
  Group lora{1e-4}, embeddings{1e-3};
  std::vector<double> betas = {0.9, 0.95};
  std::vector<std::vector<double>> grid;
  template <class V>
  void visit_fields(V& v) {
    v("steps", steps, range(1, 1e12), "Optimizer steps.");
    v("schedule", schedule, one_of({"cosine", "linear"}), "Schedule.");
    v("flag", flag, any(), "A switch.");
    v("clip", clip, any(), "Norm.");
    v("lora", lora, any(), "Group.");
    v("embeddings", embeddings, any(), "Group.");
    v("betas", betas, range(0, 1), "Betas.");
    v("grid", grid, any(), "Grid.");
  }
  void validate(const std::string& path) const {
    MOEGRAFT_CHECK_USAGE(betas.size() == 2, path, ".betas must hold 2 numbers, got ", betas.size());
  }
};

struct Whole {
  std::string dir;
  std::optional<Init> init;
  std::optional<double> limit = 2.0;
  std::map<std::string, Group> modalities;
  std::vector<Adapter> adapters;
  Train train;
  template <class V>
  void visit_fields(V& v) {
    v("dir", dir, required(), "The run directory.");
    v("init", init, any(), "From scratch.");
    v("limit", limit, range(0, 5), "A limit.");
    v("modalities", modalities, any(), "By name.");
    v("adapters", adapters, any(), "Adapters.");
    v("train", train, any(), "The loop.");
  }
};

Whole load(const std::string& yaml, const std::vector<std::string>& set = {}) {
  return parse<Whole>(Document::from_string(yaml, set, "c.yaml"));
}

std::string error_of(const std::string& yaml, const std::vector<std::string>& set = {}) {
  try {
    load(yaml, set);
  } catch (const UsageError& error) { return error.what(); }
  return "no error";
}

TEST(Config, ReadsEveryKindOfField) {
  const Whole c = load(R"(# a comment
dir: runs/a b
init: { tokenizer: 123 }
limit: null
modalities:
  image: { lr: 0.5 }
  "odd key": {}
adapters:
  - { rank: 4, sites: [q], layers: [0, 3] }
  - rank: 1e3
train:
  steps: 2.0e2
  flag: true
  clip: .inf
  lora:
    lr: 1e-5
  betas: [0.5, 1]
  grid: [[1, 2], []]
)");
  EXPECT_EQ(c.dir, "runs/a b");
  ASSERT_TRUE(c.init.has_value());
  EXPECT_EQ(c.init->tokenizer, "123") << "plain scalars are text where text is expected";
  EXPECT_EQ(c.init->family, "olmoe");
  EXPECT_FALSE(c.limit.has_value());
  EXPECT_EQ(c.modalities.at("image").lr, 0.5);
  EXPECT_EQ(c.modalities.at("odd key").lr, 1e-4);
  ASSERT_EQ(c.adapters.size(), 2u);
  EXPECT_EQ(c.adapters[0].sites, std::vector<std::string>{"q"});
  EXPECT_EQ(c.adapters[0].layers, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(c.adapters[1].rank, 1000) << "1e3 is an integer";
  EXPECT_EQ(c.adapters[1].sites.size(), 2u);
  EXPECT_EQ(c.train.steps, 200);
  EXPECT_TRUE(c.train.flag);
  EXPECT_TRUE(std::isinf(c.train.clip));
  EXPECT_EQ(c.train.lora.lr, 1e-5);
  EXPECT_EQ(c.train.embeddings.lr, 1e-3) << "defaults of the member, not of its type";
  EXPECT_EQ(c.train.grid, (std::vector<std::vector<double>>{{1, 2}, {}}));
}

TEST(Config, AbsentAndNullSectionsKeepDefaults) {
  for (const char* yaml : {"dir: x", "dir: x\ntrain:", "dir: x\ntrain: {}\ninit:\n"}) {
    const Whole c = load(yaml);
    EXPECT_EQ(c.train.steps, 1000);
    EXPECT_FALSE(c.init.has_value());
    EXPECT_EQ(c.limit, 2.0);
  }
}

// Each line: what is wrong in which way, and the whole message.
TEST(Config, ErrorsNameTheKeyTheRuleAndTheValue) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"dir: x\ntrain: {step: 3}", "train.step is not a known key; did you mean train.steps? (c.yaml:2)"},
      {"dirr: x", "dirr is not a known key; did you mean dir? (c.yaml:1)"},
      {"dir: x\nzzzzzzzzz: 1",
       "zzzzzzzzz is not a known key; expected one of dir, init, limit, modalities, adapters, train (c.yaml:2)"},
      {"{}", "dir is required: The run directory. (c.yaml)"},
      {"", "dir is required: The run directory. (c.yaml)"},
      {"dir:", "dir must be text, got null (write \"\" for empty text) (c.yaml:1)"},
      {"dir: ''", "dir must not be empty (c.yaml:1)"},
      {"dir: [a]", "dir must be text, got a list (c.yaml:1)"},
      {"dir: x\ninit: {family: olmoe}", "init.tokenizer is required: Folder of the tokenizer. (c.yaml)"},
      {"dir: x\nadapters: [{rank: 0}]", "adapters[0].rank must be in [1, 1024], got 0 (c.yaml:2)"},
      {"dir: x\nadapters:\n- {}\n- rank: 1025", "adapters[1].rank must be in [1, 1024], got 1025 (c.yaml:4)"},
      {"dir: x\nadapters: [{rank: 1.5}]", "adapters[0].rank must be an integer, got 1.5 (c.yaml:2)"},
      {"dir: x\nadapters: [{rank: '4'}]", "adapters[0].rank must be an integer, got the text \"4\" (c.yaml:2)"},
      {"dir: x\nadapters: [{rank: four}]", "adapters[0].rank must be an integer, got four (c.yaml:2)"},
      {"dir: x\nadapters: [{rank: 99999999999999999999}]",
       "adapters[0].rank does not fit a 64-bit integer, got 99999999999999999999 (c.yaml:2)"},
      {"dir: x\nadapters: [{rank: }]", "adapters[0].rank must be an integer, got null (c.yaml:2)"},
      {"dir: x\nadapters: [{sites: [gate, upp]}]",
       "adapters[0].sites[1] must be one of gate, up, down, q, got upp; did you mean up? (c.yaml:2)"},
      {"dir: x\nadapters: [{sites: gate}]", "adapters[0].sites must be a list, got gate (write [gate]) (c.yaml:2)"},
      {"dir: x\nadapters: modality_lora",
       "adapters must be a list, got modality_lora (write [{ kind: modality_lora }]) (c.yaml:2)"},
      {"dir: x\nadapters: [modality_lora]",
       "adapters[0] must be a mapping with the keys kind, rank, sites, layers, got modality_lora (write { kind: "
       "modality_lora }) (c.yaml:2)"},
      {"dir: x\nadapters: [[a]]",
       "adapters[0] must be a mapping with the keys kind, rank, sites, layers, got a list (c.yaml:2)"},
      {"dir: x\ntrain: {lora: &g {lr: 1}, embeddings: {<<: *g}}",
       "train.embeddings.<< is YAML's merge, which is not read here: write its keys out (c.yaml:2)"},
      {"dir: x\nadapters: [{kind: mixtur}]",
       "adapters[0].kind must be one of modality_lora, mixture, got mixtur; did you mean mixture? (c.yaml:2)"},
      {"dir: x\nadapters: {rank: 1}", "adapters must be a list, got a mapping (c.yaml:2)"},
      {"dir: x\nadapters:", "adapters must be a list, got null (write [] for an empty list) (c.yaml:2)"},
      {"dir: x\nadapters: [{layers: [-1]}]", "adapters[0].layers[0] must be in [0, 100], got -1 (c.yaml:2)"},
      {"dir: x\nmodalities: [a]", "modalities must be a mapping of names to values, got a list (c.yaml:2)"},
      {"dir: x\nmodalities: {image: {lr: 11}}", "modalities.image.lr must be in [0, 10], got 11 (c.yaml:2)"},
      {"dir: x\ntrain: 7",
       "train must be a mapping with the keys steps, schedule, flag, clip, lora, embeddings, betas, grid, got 7 "
       "(c.yaml:2)"},
      {"dir: x\ntrain: {flag: yes}", "train.flag must be true or false, got yes (c.yaml:2)"},
      {"dir: x\ntrain: {clip: nan}", "train.clip must be a number, got nan (c.yaml:2)"},
      {"dir: x\ntrain: {clip: .nan}", "train.clip must be a number, got .nan (c.yaml:2)"},
      {"dir: x\ntrain: {clip: 1e999}", "train.clip must be a number, got 1e999 (c.yaml:2)"},
      {"dir: x\ntrain: {clip: 0x10}", "train.clip must be a number, got 0x10 (c.yaml:2)"},
      {"dir: x\ntrain: {schedule: cosin}",
       "train.schedule must be one of cosine, linear, got cosin; did you mean cosine? (c.yaml:2)"},
      {"dir: x\ntrain: {betas: [0.9]}", "train.betas must hold 2 numbers, got 1"},
      {"dir: x\nlimit: 6", "limit must be in [0, 5], got 6 (c.yaml:2)"},
      {"dir: x\ndir: y", "c.yaml:2: the key 'dir' appears twice"},
      {"dir: x\ntrain: {steps: 1, steps: 2}", "c.yaml:2: the key 'steps' appears twice"},
      {"- a", "c.yaml: expected a mapping of keys to values, got a list"},
      {"just text", "c.yaml: expected a mapping of keys to values, got a single value"},
      {"dir: x\n---\ndir: y", "c.yaml: holds more than one YAML document, expected one"},
      {"dir: !custom x", "c.yaml:1: the tag !custom is not supported"},
      {"? [a]\n: b", "c.yaml:1: a key must be plain text"},
  };
  for (const auto& [yaml, message] : cases) EXPECT_EQ(error_of(yaml), message) << yaml;
}

TEST(Config, SyntaxErrorsNameTheLine) {
  EXPECT_EQ(error_of("dir: x\ntrain: {steps: 1").find("c.yaml:2: not valid YAML: "), 0u)
      << error_of("dir: x\ntrain: {steps: 1");
  EXPECT_EQ(error_of("dir: x\n\tbad: y").find("c.yaml:2: not valid YAML: "), 0u) << error_of("dir: x\n\tbad: y");
  EXPECT_NE(error_of("dir: \"unterminated"), "no error");
}

TEST(Config, HostileDocumentsEndInAnError) {
  EXPECT_NE(error_of(std::string(100000, '[')), "no error");
  EXPECT_NE(error_of("dir: &a [*a]"), "no error");
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string last = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + last;
    for (int k = 0; k < 9; ++k) bomb += "," + last;
    bomb += "]\n";
  }
  EXPECT_NE(error_of(bomb).find("expands to more than"), std::string::npos) << error_of(bomb);
  for (int byte = 0; byte < 256; ++byte) error_of(std::string("dir: ") + static_cast<char>(byte));
}

struct Paths {
  std::string dir, name = "~";
  std::vector<std::string> shards;
  template <class V>
  void visit_fields(V& v) {
    v("dir", dir, required(path()), "A folder.");
    v("name", name, any(), "No path.");
    v("shards", shards, path(), "Files.");
  }
};

TEST(Config, PathsAreExpandedAsAShellWould) {
  struct Case {
    const char *dir, *expected;  // the path, or how the message begins
  };
  const Case cases[] = {
      {"~", "/home/me"},
      {"~/runs/a", "/home/me/runs/a"},
      {"runs/~/a", "runs/~/a"},
      {"$MOEGRAFT_TEST/a", "/scratch/a"},
      {"${MOEGRAFT_TEST}_a", "/scratch_a"},
      {"x$MOEGRAFT_TEST", "x/scratch"},
      {"plain/a.b-c", "plain/a.b-c"},
      {"$MOEGRAFT_TEST_b", "dir: the environment variable MOEGRAFT_TEST_b is not set (in $MOEGRAFT_TEST_b)"},
      {"~someone/a", "dir: ~someone/a: only ~ and ~/"},
      {"a$", "dir: a$: expected $NAME or ${NAME} at byte 1"},
      {"${MOEGRAFT_TEST", "dir: ${MOEGRAFT_TEST: expected $NAME or ${NAME} at byte 0"},
  };
  const std::string home = std::getenv("HOME") ? std::getenv("HOME") : "";
  setenv("HOME", "/home/me", 1);
  setenv("MOEGRAFT_TEST", "/scratch", 1);
  for (const auto& c : cases) {
    std::string got;
    try {
      const auto read = parse<Paths>(
          Document::from_string("dir: '" + std::string(c.dir) + "'\nname: '$NOWHERE'\nshards: ['" + c.dir + "']"));
      got = read.dir;
      EXPECT_EQ(read.shards, std::vector<std::string>{got});
      EXPECT_EQ(read.name, "$NOWHERE") << "no path";
    } catch (const UsageError& e) { got = std::string(e.what()).substr(0, std::string(c.expected).size()); }
    EXPECT_EQ(got, c.expected) << c.dir;
  }
  setenv("HOME", home.c_str(), 1);
  unsetenv("MOEGRAFT_TEST");
}

TEST(Config, AnchorsWork) {
  const Whole c = load("dir: &d runs/x\nmodalities: {a: &m {lr: 0.25}, b: *m}\n");
  EXPECT_EQ(c.modalities.at("b").lr, 0.25);
}

TEST(Config, Overrides) {
  const Whole c = load("dir: x\nadapters: [{rank: 2}]\ntrain:\n",
                       {"train.steps=7", "adapters[0].rank=3", "adapters[1].rank=5", "dir=a=b", "init.tokenizer=t",
                        "modalities.image.lr=0.125", "train.betas=[0.1, 0.2]", "train.embeddings={lr: 0.5}",
                        "train.betas[1]=0.3", "limit="});
  EXPECT_EQ(c.train.steps, 7);
  ASSERT_EQ(c.adapters.size(), 2u);
  EXPECT_EQ(c.adapters[0].rank, 3);
  EXPECT_EQ(c.adapters[1].rank, 5);
  EXPECT_EQ(c.dir, "a=b");
  EXPECT_EQ(c.init->tokenizer, "t");
  EXPECT_EQ(c.modalities.at("image").lr, 0.125);
  EXPECT_EQ(c.train.embeddings.lr, 0.5);
  EXPECT_EQ(c.train.betas, (std::vector<double>{0.1, 0.3}));
  EXPECT_FALSE(c.limit.has_value());
  EXPECT_TRUE(load("dir: x\nadapters: [{}]", {"adapters=[]"}).adapters.empty());
}

TEST(Config, OverrideErrors) {
  const auto with = [](const std::string& text) { return error_of("dir: x\nadapters: [{}]\n", {text}); };
  EXPECT_EQ(with("train.step=3"), "train.step is not a known key; did you mean train.steps? (set by --set)");
  EXPECT_EQ(with("adapters[0].rank=0"), "adapters[0].rank must be in [1, 1024], got 0 (set by --set)");
  EXPECT_EQ(with("train.steps"), "--set train.steps: expected the form key.path=value");
  EXPECT_EQ(with("adapters[2].rank=1"), "--set adapters[2].rank=1: adapters has 1 items, index 2 would leave a hole");
  EXPECT_EQ(with("dir.a=1"), "--set dir.a=1: dir is a single value, expected a mapping");
  EXPECT_EQ(with("adapters.rank=1"), "--set adapters.rank=1: adapters is a list, expected a mapping");
  EXPECT_EQ(with("train.steps={"), error_of("dir: x", {"train.steps={"}));
  EXPECT_EQ(with("train.steps={").find("--set train.steps={: not valid YAML: "), 0u) << with("train.steps={");
  for (const char* path :
       {"", ".a", "a.", "a..b", "[0]", "a[", "a[x]", "a[-1]", "a[0]b", "a]", "a[99999999999999999999]"})
    EXPECT_NE(with(std::string(path) + "=1").find("is not a key path"), std::string::npos) << path;
}

struct Moved {
  Train train;
  double threshold = 1;
  template <class V>
  void visit_fields(V& v) {
    v("train", train, any(), "The loop.");
    v("threshold", threshold, any(), "A bound.");
  }
  static std::vector<MovedKey> moved_keys() {
    return {{"train.shape", "train.schedule",
             [](const std::string& shape, const std::string& schedule) -> std::string {
               return shape == "straight" ? "linear" : schedule;
             }},
            {"limits.upper", "threshold"},
            {"group", "train.lora"}};
  }
};

TEST(Config, AMovedKeyIsRefusedWithItsNewPlace) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"train:\n  shape: straight",
       "train.shape has moved to train.schedule: write train.schedule: linear instead (c.yaml:2)"},
      {"train: {shape: bent, schedule: cosine}",
       "train.shape has moved to train.schedule: write train.schedule: cosine instead (c.yaml:1)"},
      {"limits: {upper: 3}", "limits.upper has moved to threshold: write threshold: 3 instead (c.yaml:1)"},
      {"group: {lr: 0.5}", "group has moved to train.lora: write it there instead (c.yaml:1)"},
      {"limits: {lower: 3}", "limits is not a known key; expected one of train, threshold (c.yaml:1)"},
  };
  for (const auto& [yaml, message] : cases) {
    try {
      parse<Moved>(Document::from_string(yaml, {}, "c.yaml"));
      ADD_FAILURE() << yaml;
    } catch (const UsageError& error) { EXPECT_EQ(error.what(), message); }
  }
}

TEST(Config, AStoredDocumentIsReadWithItsKeysWhereTheyAreNow) {
  const auto stored = [](const std::string& yaml) { return parse_stored<Moved>(Document::from_string(yaml)); };
  EXPECT_EQ(stored("train: {shape: straight, schedule: cosine}").train.schedule, "linear");
  EXPECT_EQ(stored("train: {shape: bent, schedule: cosine, steps: 7}").train.steps, 7);
  EXPECT_EQ(stored("group: {lr: 0.5}").train.lora.lr, 0.5);
  EXPECT_EQ(stored("limits: {upper: 3}").threshold, 3) << "and no empty section stays behind";
  EXPECT_EQ(stored("train: {shape: }").train.schedule, "cosine") << "nothing was said";
  EXPECT_EQ(dump(stored(dump(Moved()))), dump(Moved()));
  EXPECT_THROW(stored("train: {form: straight}"), UsageError);
}

TEST(Config, FileErrors) {
  try {
    Document::from_file("/nonexistent/c.yaml");
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_STREQ(error.what(), "cannot read the config /nonexistent/c.yaml: No such file or directory");
  }
  EXPECT_THROW(Document::from_file("/tmp"), UsageError);
  const auto path =
      std::filesystem::temp_directory_path() / ("moegraft_config_" + std::to_string(::getpid()) + ".yaml");
  std::ofstream(path) << "dir: here\n";
  EXPECT_EQ(parse<Whole>(Document::from_file(path.string(), {"train.steps=5"})).train.steps, 5);
  std::filesystem::remove(path);
}

TEST(Config, DumpParsesBackIdentically) {
  Whole c;
  c.dir = "runs/\"quoted\" \\ ü 🍕\n\ttabbed: [x] # no comment \x01";
  c.limit.reset();
  c.init = Init{"mixtral", "true"};
  c.modalities["image"].lr = 0.1;
  c.modalities["null"].lr = 1.0 / 3;
  c.modalities["a: b"].lr = 5e-324;
  c.adapters.resize(2);
  c.adapters[0].sites = {};
  c.adapters[1].layers = {1, 2};
  c.adapters[1].kind = Kind::mixture;
  c.train.steps = 999999999999;
  c.train.clip = -INFINITY;
  c.train.betas = {0.1 + 0.2 - 0.05, 1e-12};
  c.train.grid = {{1e300, -0.0}, {}, {7}};
  const std::string text = dump(c);
  const Whole back = load(text);
  EXPECT_EQ(dump(back), text);
  EXPECT_EQ(back.dir, c.dir);
  EXPECT_FALSE(back.limit.has_value()) << "null must win over a default";
  EXPECT_EQ(back.init->tokenizer, "true");
  EXPECT_EQ(back.modalities.at("null").lr, 1.0 / 3);
  EXPECT_EQ(back.modalities.at("a: b").lr, 5e-324);
  EXPECT_TRUE(back.adapters[0].sites.empty());
  EXPECT_EQ(back.adapters[1].kind, Kind::mixture);
  EXPECT_EQ(back.train.steps, 999999999999);
  EXPECT_EQ(back.train.clip, -INFINITY);
  EXPECT_EQ(back.train.betas, c.train.betas);
  EXPECT_EQ(back.train.grid, c.train.grid);
  EXPECT_TRUE(std::signbit(back.train.grid[0][1]));
}

TEST(Config, AnEnumsTableIsAskedForWhatElseItsRowsHold) {
  EXPECT_TRUE(row_of(load("dir: x\nadapters: [{kind: mixture}]").adapters[0].kind).routed);
  EXPECT_EQ(name_of(Kind::mixture), "mixture");
  EXPECT_THROW(row_of(Kind{7}), InvariantError);
}

TEST(Config, AnOptionsWordIsReadByTheTableToo) {
  EXPECT_EQ(parse_choice<Kind>("--kind", "mixture"), Kind::mixture);
  EXPECT_EQ(parse_choice<Device>("--device", "auto"), Device::automatic);
  try {
    parse_choice<Device>("--device", "tpu");
    FAIL() << "tpu is no device";
  } catch (const UsageError& e) { EXPECT_STREQ(e.what(), "--device must be auto, cpu or cuda, got 'tpu'"); }
}

TEST(Config, DumpIsReadableYaml) {
  Whole c;
  c.dir = "runs/x";
  c.adapters.resize(1);
  c.modalities["image"];
  EXPECT_EQ(dump(c), R"(dir: runs/x
init: null
limit: 2.0
modalities:
  image:
    lr: 1.0e-04
adapters:
  - kind: modality_lora
    rank: 16
    sites: [gate, up]
    layers: []
train:
  steps: 1000
  schedule: cosine
  flag: false
  clip: 1.0
  lora:
    lr: 1.0e-04
  embeddings:
    lr: 0.001
  betas: [0.9, 0.95]
  grid: []
)");
}

TEST(Config, DescribeListsEveryKey) {
  std::map<std::string, Key> keys;
  for (const Key& key : describe<Whole>()) EXPECT_TRUE(keys.emplace(key.path, key).second) << key.path;
  EXPECT_EQ(keys.size(), 23u);
  EXPECT_TRUE(keys.at("dir").required);
  EXPECT_EQ(keys.at("init").default_text, "null");
  EXPECT_EQ(keys.at("init.family").choices.at(1).name, "mixtral");
  EXPECT_TRUE(keys.at("init.tokenizer").in_entry);
  EXPECT_EQ(keys.at("modalities.<name>.lr").max, 10);
  EXPECT_EQ(keys.at("adapters").type, "list of sections");
  EXPECT_EQ(keys.at("adapters[].sites").default_text, "[gate, up]");
  EXPECT_EQ(keys.at("train").type, "section");
  EXPECT_EQ(keys.at("train.embeddings.lr").default_text, "0.001");
  EXPECT_FALSE(keys.at("train.embeddings.lr").in_entry);
  EXPECT_EQ(keys.at("train.grid").type, "list of lists of numbers");
  EXPECT_EQ(keys.at("train.betas").meaning, "Betas.");
}

TEST(Config, MarkdownHasATablePerSection) {
  const std::string text = to_markdown(describe<Whole>());
  for (const char* line : {"| `dir` | text | **required** | The run directory. |\n",
                           "| `limit` | optional number in [0, 5] | `2.0` | A limit. |\n",
                           "\n### init\n\nFrom scratch. (optional section)\n\n",
                           "| `init.family` | text: one of `olmoe`, `mixtral` | `olmoe` | Layout. |\n",
                           "| `modalities.<name>.lr` | number in [0, 10] | `1.0e-04` | Peak learning rate. |\n",
                           "\n### adapters\n\nAdapters. (list of sections)\n\n| key | type | default | meaning "
                           "|\n|---|---|---|---|\n| `adapters[].kind` | text: one of `modality_lora`, `mixture` | "
                           "`modality_lora` | Kind.<br>`modality_lora`: Gated. |\n",
                           "| `train.embeddings` | section |  | Group. |\n"})
    EXPECT_NE(text.find(line), std::string::npos) << line << "\nin\n" << text;
}

TEST(Config, YamlTemplateParsesToTheDefaults) {
  const std::string text = to_yaml(describe<Whole>());
  EXPECT_EQ(dump(load(text, {"dir=x"})), dump(load("dir: x")));
  EXPECT_EQ(text.find("# The run directory. (text, required)\ndir:\n"), 0u) << text;
  // Entries stand there as comments: without their # they parse too.
  const std::string list =
                        "\nadapters: []\n#  -\n#    # Kind. (text: one of modality_lora, mixture)\n#    #   "
                        "modality_lora: Gated.\n#    kind: modality_lora\n",
                    mapping = "\nmodalities: {}\n#  <name>:\n#    # Peak learning rate.";
  for (const auto& lines : {list, mapping}) EXPECT_NE(text.find(lines), std::string::npos) << lines << "\nin\n" << text;
  std::string entries;
  for (size_t at = 0, end; at < text.size(); at = end + 1) {
    end = text.find('\n', at);
    std::string line = text.substr(at, end - at);
    if (line.starts_with("#  ")) line.erase(0, 1);
    for (const char* empty : {" null", " []", " {}"})
      if (line.starts_with("init:") || line.starts_with("adapters:") || line.starts_with("modalities:"))
        line = line.substr(0, line.find(empty));
    entries += line + "\n";
  }
  const Whole c = load(entries, {"dir=x", "init.tokenizer=t"});
  EXPECT_EQ(c.init->family, "olmoe");
  EXPECT_EQ(c.adapters.at(0).rank, 16);
  EXPECT_EQ(c.modalities.at("<name>").lr, 1e-4);
}

}  // namespace
}  // namespace moegraft::config
