// Keys that have gone to another place: refused in a user's file, migrated in what an earlier version of the program
// stored.

#include <utility>

#include "moegraft/config/config.h"

namespace moegraft::config::detail {
namespace {

// "train.precision" -> its section ("train") and its name.
std::pair<std::string, std::string> split(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? std::pair(std::string(), path)
                                  : std::pair(path.substr(0, dot), path.substr(dot + 1));
}

Cursor find(const Cursor& at, const std::string& path) {
  const auto [section, name] = split(path);
  return section.empty() ? at.child(name) : find(at, section).child(name);
}

// The value at `path`; sections that are missing are made.
Tree& make(Tree& root, const std::string& path) {
  const auto [section, name] = split(path);
  Tree& at = section.empty() ? root : make(root, section);
  at.kind = Tree::Kind::map;
  for (TreeEntry& entry : at.entries)
    if (entry.key == name) return entry.value;
  return at.entries.emplace_back(TreeEntry{name, {}}).value;
}

// Drops the value at `path`, and a section that held nothing else.
void erase(Tree& root, const std::string& path) {
  const auto place = split(path);
  Tree& section = place.first.empty() ? root : make(root, place.first);
  std::erase_if(section.entries, [&](const TreeEntry& entry) { return entry.key == place.second; });
  if (section.entries.empty() && !place.first.empty()) erase(root, place.first);
}

// What the new key is to hold; null where the old one held nothing.
Tree moved_value(const MovedKey& key, const Tree& old_value, const Tree* present) {
  Tree value = old_value;
  if (key.value != nullptr && old_value.kind == Tree::Kind::scalar)
    value.text = key.value(old_value.text, present != nullptr ? present->text : "");
  return value;
}

}  // namespace

void refuse_moved(const Cursor& root, const std::vector<MovedKey>& moved) {
  for (const MovedKey& key : moved) {
    const Cursor at = find(root, key.from);
    if (at.tree == nullptr) continue;
    const Tree value = moved_value(key, *at.tree, find(root, key.to).tree);
    at.fail("has moved to " + key.to + ": write " +
            (value.kind == Tree::Kind::scalar ? key.to + ": " + to_flow(value) : "it there") + " instead");
  }
}

Tree migrated(Tree root, const std::vector<MovedKey>& moved) {
  for (const MovedKey& key : moved) {
    const Cursor whole{&root, "", ""};
    const Cursor old = find(whole, key.from);
    if (old.tree == nullptr) continue;
    Tree value = moved_value(key, *old.tree, find(whole, key.to).tree);
    erase(root, key.from);
    if (value.kind != Tree::Kind::null) make(root, key.to) = std::move(value);
  }
  return root;
}

}  // namespace moegraft::config::detail
