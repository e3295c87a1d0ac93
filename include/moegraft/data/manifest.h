#pragma once
// Manifests: one document a row, in any of these shapes, written as lines of JSONL. Image paths are relative to the
// manifest's folder, or absolute; they may lead out of it
// ("../"): a manifest reads whatever its user may read.
//   {"image": "images/x.png", "text": "red heart", "captions": ["red heart", "a picture of a red heart"], …}
//   {"segments": [{"text": "look: "}, {"image": "x.png"}, {"text": "nice"}, {"image": "y.png", "modality": "sketch"}]}
//   {"image": "x.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value":
//   "a dog"}]}
//   {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is
//   it?"}]}, {"role": "assistant", "content": "a dog"}]}
//   {"text": "no picture at all"}
//   {"images": ["x.png", "y.png"], "text": "<image> and <image> are alike"}
//   {"images": ["x.png"], "messages": [{"role": "user", "content": "<image> what is it?"}, {"role": "assistant",
//   "content": "a dog"}]}
// "file_name" may stand for "image" and "caption" for "text" (Hugging Face's ImageFolder), "images": [...] for "image",
// a list under "text" for "captions". Every <image> in a text, and every part of type image that names none, takes the
// next picture that is listed: as many as there are, or none at all (then pictures precede turns and follow captions).
// A picture that is null is a lost one beside a caption, and none beside turns. Turns are joined by line ends, without
// their roles. Other keys are left alone ("keywords", "emoji", …) unless they look like the one that a document lacks
// misspelt, or hold the picture that it lacks. Rows come out of any format that io/rows.h lists: JSONL, CSV,
// ImageFolder, WebDataset tars, Parquet and Arrow. The keys and their rules are the same in all of them.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "moegraft/io/picture.h"

namespace moegraft::data {

struct ManifestSegment {
  std::string text;  // set, or
  io::Picture
      image;  // set: a file (resolved against the manifest's folder), or a place in a tar, Parquet or Arrow file
  std::string modality = {};  // of an image: named by its segment, or empty
  bool is_image() const { return !image.empty(); }
};

struct ManifestEntry {
  std::vector<ManifestSegment> segments;  // a captioned picture: its text, then the picture
  std::vector<std::string> captions;  // every caption of a captioned picture, "text" first; empty in the other shapes
  int64_t line = 0;                   // of its row, 1-based
};

// A row that cannot be read, or whose picture is not there: "file:line: why", "x.tar: key: why".
using BadRow = std::function<void(const std::string& why)>;

// Names of a data set's own columns, which stand for "image" and "text". Empty: ours.
struct ManifestColumns {
  std::string image, text;
};

// bad: told of each such row, which is left out; without it the first one is an error. UserError: a missing file, a
// file that is damaged as a whole, no entry.
std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path, const BadRow& bad = {},
                                         const ManifestColumns& columns = {});

}  // namespace moegraft::data
