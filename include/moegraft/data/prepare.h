#pragma once
// Manifests and text files to shards.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moegraft/data/manifest.h"

namespace moegraft::data {

struct ShardOptions {
  std::vector<std::filesystem::path> manifests;  // JSONL, see manifest.h
  ManifestColumns columns;                       // of theirs
  std::vector<std::filesystem::path> texts;      // one document a line
  std::filesystem::path tokenizer,
      codec;  // codec: needed when a manifest holds images, of those whose segment names no modality
  std::filesystem::path output;
  std::string modality = "image";                       // of those images
  std::map<std::string, std::filesystem::path> codecs;  // of images whose segment names another modality, by its name
  std::string captions =
      "text";  // text: the main caption; all: one document for each caption, those of a picture being one item
  std::string prefix, suffix;    // put around the caption of a captioned picture
  int64_t batch_size = 64;       // images encoded at a time
  int64_t max_tokens = 1 << 26;  // tokens in one shard file
  bool lowercase = false;
  bool overwrite = false;
  bool strict = false;  // the first row that cannot be read ends the job
};

struct ShardSummary {
  int64_t documents = 0, tokens = 0, images = 0, text_tokens = 0;
  int64_t skipped_images = 0;     // did not decode; named in the log
  int64_t skipped_documents = 0;  // held such an image, or no token
  int64_t bad_rows = 0;           // of manifests: could not be read; named in the log
};

// Tokenises text, encodes images through their modality's codec (each file once by each) and writes shards. An image
// that does not decode, or a row that cannot be read, is named, its document skipped and counted. UserError: missing
// manifest, tokenizer or codec; nothing left to write, or less than half of it; with strict anything that would be
// skipped.
ShardSummary prepare_shards(const ShardOptions& options);

}  // namespace moegraft::data
