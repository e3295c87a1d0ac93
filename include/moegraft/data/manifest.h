#pragma once
// JSONL manifests: one document a line, in any of these shapes. Image paths are relative to the manifest's folder, or absolute; they may lead out of it ("../"): a manifest
// reads whatever its user may read.
//   {"image": "images/x.png", "text": "red heart", "captions": ["red heart", "a picture of a red heart"], …}
//   {"segments": [{"text": "look: "}, {"image": "x.png"}, {"text": "nice"}]}
//   {"image": "x.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]}
//   {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is it?"}]}, {"role": "assistant", "content": "a dog"}]}
//   {"text": "no picture at all"}
// "file_name" may stand for "image" and "caption" for "text" (Hugging Face's ImageFolder); "images": [...] for "image" in conversations and messages. Turns are joined by
// line ends, without their roles. Other keys are left alone ("keywords", "emoji", …) unless they look like one of these misspelt, or hold the picture that a document lacks.
// Instead of a file: an ImageFolder directory, with metadata.jsonl or metadata.csv, or with a folder for each label (its text).

#include <filesystem>
#include <functional>
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

// A row that cannot be read, or whose picture is not there: "file:line: why".
using BadRow = std::function<void(const std::string& why)>;

// bad: told of each such row, which is left out; without it the first one is an error. UserError: a missing file, another format than JSONL, no entry.
std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path, const BadRow& bad = {});

}  // namespace moegraft::data
