#pragma once
// JSONL manifests: one document a line, in any of these shapes. Image paths are relative to the manifest's folder.
//   {"image": "images/x.png", "text": "red heart", "captions": ["red heart", "a picture of a red heart"], …}
//   {"segments": [{"text": "look: "}, {"image": "x.png"}, {"text": "nice"}]}
//   {"image": "x.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]}
//   {"text": "no picture at all"}
// Other keys are kept out of the way ("keywords", "emoji", …). "images": [...] may stand for "image" in conversations.

#include <filesystem>
#include <string>
#include <vector>

namespace moegraft::data {

struct ManifestSegment {
  std::string text;             // set, or
  std::filesystem::path image;  // set, resolved against the manifest's folder
  bool is_image() const { return !image.empty(); }
};

struct ManifestEntry {
  std::vector<ManifestSegment> segments;  // a captioned picture: its text, then the picture
  std::vector<std::string> captions;      // every caption of a captioned picture, "text" first; empty in the other shapes
  int64_t line = 0;                       // 1-based
};

// UserError names the file, the line and what is wrong: missing file, broken JSON, no known shape, placeholders that do not match the images, no entry.
std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path);

}  // namespace moegraft::data
