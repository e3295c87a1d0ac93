// YAML text -> Tree, and --set overrides on a Tree.

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <sstream>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/config/config.h"

namespace moegraft::config {

namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxNodes = 1'000'000;  // aliases of aliases can describe far more than the file's size

// Builds a Tree from yaml-cpp's events: unlike its nodes they keep duplicate keys, lines and quoting.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(std::string source, bool with_lines) : source_(std::move(source)), with_lines_(with_lines) {}
  Tree take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { add(leaf(mark), anchor); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto it = anchors_.find(anchor);
    if (it == anchors_.end()) error(mark, "an alias inside the value that it names");
    add(Tree(it->second), 0);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    Tree tree = leaf(mark);
    tree.quoted = tag == "!" || tag == "tag:yaml.org,2002:str";
    if (!tree.quoted && tag != "?" && !tag.empty()) error(mark, "the tag " + tag + " is not supported");
    if (tree.quoted || !(value.empty() || value == "~" || value == "null" || value == "Null" || value == "NULL")) {
      tree.kind = Tree::Kind::scalar;
      tree.text = value;
    }
    add(std::move(tree), anchor);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, Tree::Kind::list, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, Tree::Kind::map, anchor);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Level {
    Tree tree;
    YAML::anchor_t anchor;
    std::set<std::string> keys;
    bool has_key = false;
    std::string key;
  };

  Tree leaf(const YAML::Mark& mark) const {
    Tree tree;
    tree.line = with_lines_ ? mark.line + 1 : 0;
    return tree;
  }
  [[noreturn]] void error(const YAML::Mark& mark, const std::string& what) const { error_at(mark.line + 1, what); }
  [[noreturn]] void error_at(int64_t line, const std::string& what) const {
    fail<UsageError>(source_, with_lines_ ? ":" + std::to_string(line) : "", ": ", what);
  }

  void open(const YAML::Mark& mark, Tree::Kind kind, YAML::anchor_t anchor) {
    if (levels_.size() >= kMaxDepth) error(mark, "nested deeper than " + std::to_string(kMaxDepth) + " levels");
    Tree tree = leaf(mark);
    tree.kind = kind;
    levels_.push_back({std::move(tree), anchor, {}, false, {}});
  }
  void close() {
    Level level = std::move(levels_.back());
    levels_.pop_back();
    add(std::move(level.tree), level.anchor);
  }

  static size_t size(const Tree& tree) {
    size_t total = 1;
    for (const auto& entry : tree.entries) total += size(entry.value);
    return total;
  }

  void add(Tree tree, YAML::anchor_t anchor) {
    nodes_ += size(tree);
    if (nodes_ > kMaxNodes)
      error_at(tree.line, "the document expands to more than " + std::to_string(kMaxNodes) + " values");
    if (anchor != 0) anchors_[anchor] = tree;
    if (levels_.empty()) {
      root_ = std::move(tree);
      return;
    }
    Level& level = levels_.back();
    if (level.tree.kind == Tree::Kind::list) {
      level.tree.entries.push_back({"", std::move(tree)});
    } else if (!level.has_key) {
      if (tree.kind != Tree::Kind::scalar) error_at(tree.line, "a key must be plain text");
      if (!level.keys.insert(tree.text).second) error_at(tree.line, "the key '" + tree.text + "' appears twice");
      level.key = tree.text;
      level.has_key = true;
    } else {
      level.tree.entries.push_back({level.key, std::move(tree)});
      level.has_key = false;
    }
  }

  std::string source_;
  bool with_lines_;
  Tree root_;
  std::vector<Level> levels_;
  std::map<YAML::anchor_t, Tree> anchors_;
  size_t nodes_ = 0;
};

Tree parse_yaml(const std::string& yaml, const std::string& source, bool with_lines) {
  std::istringstream stream(yaml);
  TreeBuilder builder(source, with_lines);
  try {
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder)) return {};
    Tree root = builder.take();
    TreeBuilder second(source, with_lines);
    if (parser.HandleNextDocument(second))
      fail<UsageError>(source, ": holds more than one YAML document, expected one");
    return root;
  } catch (const YAML::Exception& error) {
    fail<UsageError>(source, with_lines ? ":" + std::to_string(error.mark.line + 1) : "",
                     ": not valid YAML: ", error.msg);
  }
}

const char* kind_name(Tree::Kind kind) {
  switch (kind) {
    case Tree::Kind::null: return "null";
    case Tree::Kind::scalar: return "a single value";
    case Tree::Kind::list: return "a list";
    case Tree::Kind::map: return "a mapping";
  }
  return "";
}

struct Step {
  std::string key;  // empty: an index
  size_t index = 0;
};

// "a.b[0].c" -> a, b, [0], c
std::vector<Step> parse_path(const std::string& path, const std::string& override_text) {
  const auto bad = [&]() -> std::vector<Step> {
    fail<UsageError>("--set ", override_text, ": '", path, "' is not a key path, expected the form a.b[0].c=value");
  };
  std::vector<Step> steps;
  size_t at = 0;
  for (bool first = true; at < path.size(); first = false) {
    if (path[at] == '[') {
      const size_t end = path.find(']', at);
      if (first || end == std::string::npos) return bad();
      Step step;
      const char* stop = path.data() + end;
      const auto [last, error] = std::from_chars(path.data() + at + 1, stop, step.index);
      if (error != std::errc() || last != stop) return bad();
      steps.push_back(step);
      at = end + 1;
    } else {
      if (first == (path[at] == '.')) return bad();
      if (!first) ++at;
      const size_t end = std::min(path.find_first_of(".[]", at), path.size());
      if (end == at || (end < path.size() && path[end] == ']')) return bad();
      steps.push_back({path.substr(at, end - at)});
      at = end;
    }
  }
  if (steps.empty()) return bad();
  return steps;
}

void apply_override(Tree& root, const std::string& text) {
  const size_t equals = text.find('=');
  MOEGRAFT_CHECK_USAGE(equals != std::string::npos, "--set ", text, ": expected the form key.path=value");
  const std::string path = trim(text.substr(0, equals));
  Tree* at = &root;
  std::string walked;
  for (const Step& step : parse_path(path, text)) {
    const Tree::Kind needed = step.key.empty() ? Tree::Kind::list : Tree::Kind::map;
    if (at->kind == Tree::Kind::null) at->kind = needed;
    MOEGRAFT_CHECK_USAGE(at->kind == needed, "--set ", text, ": ", walked.empty() ? "the document" : walked, " is ",
                         kind_name(at->kind), ", expected ", kind_name(needed));
    if (step.key.empty()) {
      MOEGRAFT_CHECK_USAGE(step.index <= at->entries.size(), "--set ", text, ": ", walked, " has ", at->entries.size(),
                           " items, index ", step.index, " would leave a hole");
      if (step.index == at->entries.size()) at->entries.emplace_back();
      at = &at->entries[step.index].value;
      walked += "[" + std::to_string(step.index) + "]";
    } else {
      TreeEntry* found = nullptr;
      for (auto& entry : at->entries)
        if (entry.key == step.key) found = &entry;
      if (found == nullptr) found = &at->entries.emplace_back(TreeEntry{step.key, {}});
      at = &found->value;
      walked += (walked.empty() ? "" : ".") + step.key;
    }
  }
  *at = parse_yaml(text.substr(equals + 1), "--set " + text, false);
}

// config must not depend on io, which stands beside it.
std::string read_text(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  std::string text;
  char chunk[1 << 14];
  size_t n = 0;
  while (file && (n = std::fread(chunk, 1, sizeof chunk, file.get())) > 0) text.append(chunk, n);
  if (!file || std::ferror(file.get())) fail<UsageError>("cannot read the config ", path, ": ", std::strerror(errno));
  return text;
}

}  // namespace

Document Document::from_file(const std::string& path, const std::vector<std::string>& overrides) {
  return from_string(read_text(path), overrides, path);
}

Document Document::from_string(const std::string& yaml, const std::vector<std::string>& overrides,
                               const std::string& name) {
  Document document;
  document.name_ = name;
  document.root_ = parse_yaml(yaml, name, true);
  MOEGRAFT_CHECK_USAGE(document.root_.kind == Tree::Kind::map || document.root_.kind == Tree::Kind::null, name,
                       ": expected a mapping of keys to values, got ", kind_name(document.root_.kind));
  for (const auto& text : overrides) apply_override(document.root_, text);
  return document;
}

}  // namespace moegraft::config
