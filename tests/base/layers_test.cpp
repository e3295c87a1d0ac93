// The direction of dependency: an include points down the layers, or along one of the edges listed here.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "../support/paths.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;

const std::map<std::string, int> kLayerOf = {
    {"base", 0},        {"config", 1},    {"io", 1},         {"kernels", 1},  {"ot", 1},
    {"distributed", 1}, {"model", 2},     {"tokenizer", 2},  {"codec", 2},    {"adapters", 3},
    {"data", 3},        {"routing", 3},   {"checkpoint", 3}, {"parallel", 3}, {"convert", 3},
    {"run", 4},         {"graft", 4},     {"generate", 4},   {"evaluate", 4}, {"planning", 4},
    {"train", 4},       {"exporting", 4}, {"report", 4},     {"tools", 5},    {"recipes", 5},
};

// Within a layer: from -> what it may include. No cycles (checked below).
const std::map<std::string, std::set<std::string>> kSameLayer = {
    {"ot", {"config", "kernels"}},
    {"distributed", {"kernels"}},
    {"graft", {"run"}},
    {"generate", {"graft", "run"}},
    {"evaluate", {"generate", "graft", "run"}},
    {"planning", {"graft", "run"}},
    {"train", {"evaluate", "generate", "graft", "planning", "run"}},
    {"exporting", {"graft", "run"}},
    {"report", {"run"}},
};

// What a public header may not bring to its users: device, wire and parser headers, and whole-library headers that cost
// half a minute a file.
const std::regex kHeavy(
    R"(^(cuda|cublas|cusparse|cudnn|nvrtc|nccl|cub/|cutlass|cute/|ATen/cuda|c10/cuda|torch/csrc/(cuda|distributed)|yaml-cpp|nlohmann|spdlog|fmt/|)"
    R"(torch/torch\.h|torch/all\.h|torch/extension\.h|ATen/ATen\.h|CLI/|png\.h|jpeglib|ft2build|pugixml|sentencepiece))");
// Exceptions, header -> the includes it exists for.
const std::map<std::string, std::string> kHeavyAllowed = {{"include/moegraft/io/json.h", "nlohmann"}};

// <module>/config.h, a section of the YAML, is a leaf: any layer may read it, for it brings its own fields alone.
bool is_section(const std::string& module, const std::string& header) {
  return module != "config" && header == "moegraft/" + module + "/config.h";
}

bool allowed(const std::string& from, const std::string& to) {
  if (from == to) return true;
  if (kLayerOf.at(from) != kLayerOf.at(to)) return kLayerOf.at(from) > kLayerOf.at(to);
  const auto edges = kSameLayer.find(from);
  return edges != kSameLayer.end() && edges->second.contains(to);
}

std::vector<std::string> lines_of(const fs::path& path) {
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

bool is_source(const fs::path& path) {
  static const std::set<std::string> kinds = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"};
  return kinds.contains(path.extension().string());
}

// Every include under root/{include/moegraft,src,tools,recipes} that breaks a rule, as "file:line: what".
std::vector<std::string> violations(const fs::path& root) {
  static const std::regex include_line(R"(^\s*#\s*include\s*[<"]([^>"]+)[>"])");
  std::vector<std::string> found;
  for (const char* part : {"include/moegraft", "src", "tools", "recipes"}) {
    if (!fs::exists(root / part)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / part)) {
      if (!entry.is_regular_file() || !is_source(entry.path())) continue;
      const std::string file = fs::relative(entry.path(), root).generic_string();
      const bool is_public = file.starts_with("include/");
      const fs::path inside = fs::relative(entry.path(), root / part);
      if (file == "src/libtorch.h") continue;  // the precompiled header: below every module, includes LibTorch alone
      const bool is_top = std::string(part) == "tools" || std::string(part) == "recipes";
      const std::string module = is_top ? part : inside.begin()->string();
      const auto report = [&](size_t line, const std::string& what) {
        found.push_back(file + ":" + std::to_string(line + 1) + ": " + what);
      };
      if (!kLayerOf.contains(module)) {
        report(0, "module '" + module + "' is not in the table of layers");
        continue;
      }
      const auto lines = lines_of(entry.path());
      const bool is_leaf = file == "include/moegraft/" + module + "/config.h" && module != "config";
      for (size_t i = 0; i < lines.size(); ++i) {
        std::smatch match;
        if (!std::regex_search(lines[i], match, include_line)) continue;
        const std::string target = match[1];
        if (target.find("../") != std::string::npos &&
            (inside.parent_path() / target).lexically_normal().begin()->string() != module) {
          report(i, "leaves its module through '../': " + target);
        }
        const bool names_public = target.starts_with("moegraft/");
        const std::string path = names_public ? target.substr(9) : target;
        const std::string to = path.substr(0, path.find('/'));
        const bool names_module =
            path.find('/') != std::string::npos && kLayerOf.contains(to) && to != "tools" && to != "recipes";
        if (is_leaf && !(names_module && (to == "base" || to == "config")) &&
            target.find_first_of("/.") != std::string::npos) {
          report(i, "a section's header may include base, config and the standard library alone: " + target);
        }
        if (names_public && !names_module) {
          report(i, "unknown module in " + target);
        } else if (names_public && !allowed(module, to) && !is_section(to, target)) {
          report(i, module + " may not include " + to + " (" + target + ")");
        } else if (!names_public && !is_top && target.find('/') != std::string::npos &&
                   fs::exists(root / "recipes" / target)) {
          report(i, "a recipe is for tools alone: " + target);
        } else if (!names_public && names_module && (to != module || is_public) && fs::exists(root / "src" / target)) {
          report(i, "private header of " + to + ": " + target);
        }
        const auto exception = kHeavyAllowed.find(file);
        if (is_public && std::regex_search(target, kHeavy) &&
            (exception == kHeavyAllowed.end() || !target.starts_with(exception->second))) {
          report(i, "a public header includes " + target);
        }
      }
    }
  }
  return found;
}

// Pairs (from, to) of moegraft_module(from … LIBS … moegraft_to …) in CMakeLists.txt.
std::vector<std::pair<std::string, std::string>> linked_modules(const fs::path& cmake_lists) {
  static const std::regex call(R"(^\s*moegraft_module\((\w+)(.*)\))"), library(R"(moegraft_(\w+))");
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const std::string& line : lines_of(cmake_lists)) {
    std::smatch match;
    if (!std::regex_search(line, match, call)) continue;
    const std::string rest = match[2];
    for (std::sregex_iterator it(rest.begin(), rest.end(), library), end; it != end; ++it)
      pairs.emplace_back(match[1], (*it)[1]);
  }
  return pairs;
}

class PlantedTree : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("moegraft-layers-" + std::to_string(::getpid()));
    fs::remove_all(root_);
  }
  void TearDown() override { fs::remove_all(root_); }
  void plant(const std::string& file, const std::string& text) {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }
  fs::path root_;
};

TEST(Layers, IncludesPointDown) {
  const auto found = violations(test_source_dir());
  for (const std::string& what : found) ADD_FAILURE() << what;
}

TEST(Layers, LibrariesLinkDown) {
  const auto pairs = linked_modules(fs::path(test_source_dir()) / "CMakeLists.txt");
  EXPECT_GE(pairs.size(), 10u);
  for (const auto& [from, to] : pairs) {
    ASSERT_TRUE(kLayerOf.contains(from)) << from;
    ASSERT_TRUE(kLayerOf.contains(to)) << to;
    EXPECT_TRUE(allowed(from, to)) << "CMakeLists.txt: " << from << " may not link " << to;
  }
}

TEST(Layers, SameLayerEdgesFormNoCycle) {
  // Repeatedly drop the modules that need none of the remaining ones; a cycle never empties.
  auto remaining = kSameLayer;
  for (bool dropped = true; dropped;) {
    dropped = false;
    for (auto it = remaining.begin(); it != remaining.end();) {
      bool needed = false;
      for (const std::string& to : it->second) {
        EXPECT_EQ(kLayerOf.at(it->first), kLayerOf.at(to)) << it->first << " -> " << to << " is not within a layer";
        needed = needed || remaining.contains(to);
      }
      if (!needed) {
        it = remaining.erase(it);
        dropped = true;
      } else {
        ++it;
      }
    }
  }
  EXPECT_TRUE(remaining.empty()) << remaining.begin()->first << " is on a cycle";
}

TEST_F(PlantedTree, GoodTreePasses) {
  plant("include/moegraft/base/check.h", "#include <string>\n");
  plant("include/moegraft/model/spec.h", "#include \"moegraft/base/check.h\"\n#include <ATen/core/Tensor.h>\n");
  plant("include/moegraft/io/json.h", "#include <nlohmann/json.hpp>\n");
  plant("src/train/loop.cpp",
        "#include \"moegraft/evaluate/evaluate.h\"\n#include \"train/private.h\"\n#include <nlohmann/json.hpp>\n");
  plant("src/train/private.h", "");
  plant("include/moegraft/train/config.h", "#include <string>\n#include \"moegraft/config/config.h\"\n");
  plant("src/run/run_config.cpp", "#include \"moegraft/train/config.h\"\n");
  plant("src/model/families/olmoe.cpp", "#include \"../family.h\"\n");
  plant("tools/moegraft/main.cpp", "#include \"command.h\"\n#include \"moegraft/train/train.h\"\n");
  EXPECT_EQ(violations(root_), std::vector<std::string>{});
}

TEST_F(PlantedTree, EachBrokenRuleIsNamedWithFileAndLine) {
  const std::vector<std::tuple<std::string, std::string, std::string>> cases = {
      {"src/model/decoder.cpp", "\n#include \"moegraft/train/loop.h\"\n",
       "src/model/decoder.cpp:2: model may not include train (moegraft/train/loop.h)"},
      {"include/moegraft/train/config.h", "#include <string>\n#include \"moegraft/model/spec.h\"\n",
       "include/moegraft/train/config.h:2: a section's header may include base, config and the standard library alone: "
       "moegraft/model/spec.h"},
      {"src/base/log.cpp", "#include \"moegraft/config/config.h\"\n",
       "src/base/log.cpp:1: base may not include config (moegraft/config/config.h)"},
      {"src/io/image.cpp", "#include <moegraft/kernels/gemm.h>\n",
       "src/io/image.cpp:1: io may not include kernels (moegraft/kernels/gemm.h)"},
      {"include/moegraft/run/a.h", "#  include \"moegraft/graft/b.h\"\n",
       "include/moegraft/run/a.h:1: run may not include graft (moegraft/graft/b.h)"},
      {"src/graft/x.cpp", "#include \"../model/y.h\"\n",
       "src/graft/x.cpp:1: leaves its module through '../': ../model/y.h"},
      {"src/ot/x.cpp", "#include \"moegraft/otter/y.h\"\n", "src/ot/x.cpp:1: unknown module in moegraft/otter/y.h"},
      {"src/otter/x.cpp", "", "src/otter/x.cpp:1: module 'otter' is not in the table of layers"},
      {"include/moegraft/kernels/a.h", "#include <cuda_runtime.h>\n",
       "include/moegraft/kernels/a.h:1: a public header includes cuda_runtime.h"},
      {"include/moegraft/config/a.h", "#include <yaml-cpp/yaml.h>\n",
       "include/moegraft/config/a.h:1: a public header includes yaml-cpp/yaml.h"},
      {"include/moegraft/io/json.h", "#include <nccl.h>\n",
       "include/moegraft/io/json.h:1: a public header includes nccl.h"},
      {"include/moegraft/io/other.h", "#include <nlohmann/json.hpp>\n",
       "include/moegraft/io/other.h:1: a public header includes nlohmann/json.hpp"},
  };
  for (const auto& [file, text, expected] : cases) {
    fs::remove_all(root_);
    plant(file, text);
    EXPECT_EQ(violations(root_), std::vector<std::string>{expected});
  }
  fs::remove_all(root_);
  plant("recipes/emoji/font.h", "");
  plant("recipes/emoji/font.cpp", "#include \"emoji/font.h\"\n#include \"moegraft/data/unicode.h\"\n");
  plant("tools/moegraft/data.cpp", "#include \"emoji/font.h\"\n");
  plant("src/data/prepare.cpp", "#include \"emoji/font.h\"\n");
  EXPECT_EQ(violations(root_),
            std::vector<std::string>{"src/data/prepare.cpp:1: a recipe is for tools alone: emoji/font.h"});
  fs::remove_all(root_);
  plant("src/model/private.h", "");
  plant("src/graft/x.cpp", "#include \"model/private.h\"\n");
  EXPECT_EQ(violations(root_), std::vector<std::string>{"src/graft/x.cpp:1: private header of model: model/private.h"});
}

}  // namespace
}  // namespace moegraft
