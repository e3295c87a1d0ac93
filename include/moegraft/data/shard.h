#pragma once
// Pre-tokenised shards: safetensors files that any tool can write.
//
//   tensor            dtype   shape      what
//   ids               int32   [T]        text: token ids in [0, text_vocab); another modality: the raw code in [0,
//   codes_<name>) modality          uint8   [T]        index into metadata "modalities"; 0 is text document_offsets
//   int64   [n+1]      document i is [offsets[i], offsets[i+1]); offsets[0] = 0, offsets[n] = T, none empty
//   item_offsets      int64   [m+1]      optional: item j is the documents [offsets[j], offsets[j+1]), such as a
//   picture and each of its captions;
//                                        offsets[0] = 0, offsets[m] = n, none empty. Without it every document is an
//                                        item.
//
//   metadata (all strings): format = "moegraft.shard", version = "1", modalities = "text,image", text_vocab = "2048",
//   and for each other modality codes_<name> = "512" (codes of all its codebooks) and item_length_<name> = "36" (codes
//   of one item). Optional: codebooks_<name> = "2", 1 where it is absent, and positions_<name> = "6x6" (rows x columns)
//   or "75" (of a sequence). codec/code_shape.h says how an item's codes follow one another and which of them each
//   place may hold; positions times codebooks is the item length. A set may hold several modalities, in one document
//   too. Optional: fingerprint.tokenizer, fingerprint.codec.<name> (data/fingerprints.h: what made it), shard = "0"
//   (its place in its set, counted from 0) and, in the last file of a set, shards = "1": a set that says so is read
//   whole or not at all. counts.<what> = "3": documents or images that were skipped.
//
// Neither BOS, EOS nor the begin and end tokens of a span are stored: the stream adds them. A run of codes holds a
// whole number of items. A data set is one such file or a folder of them, read in the order of their names.

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moegraft/io/safetensors.h"
#include "moegraft/io/staged_folder.h"

namespace moegraft::data {

// One run of tokens of the same modality. Views of the mapped file, or of the writer's caller.
struct Segment {
  int64_t modality = 0;          // index into Schema::modalities
  std::span<const int32_t> ids;  // text ids, or codes
};

struct ModalitySchema {
  std::string name;
  int64_t num_codes = 0;                // text: its vocabulary
  int64_t item_length = 0;              // text: 0
  int64_t codebooks = 1;                // of an item's positions
  std::vector<int64_t> positions = {};  // of an item; empty where the shard does not say
  bool operator==(const ModalitySchema&) const = default;
};

struct Schema {
  std::vector<ModalitySchema> modalities;  // [0] is text
  bool operator==(const Schema&) const = default;
};

// Documents [first, first + count) of a set: one thing said in several ways.
struct Item {
  int64_t first = 0, count = 1;
};

// A shard file or a folder of them, memory-mapped. Headers, shapes and offsets are checked when opened, a document's
// ids when it is read.
class ShardSet {
 public:
  // UserError: missing path, no shard in the folder, wrong format or version, a schema whose sizes do not agree,
  // missing tensor, dtype, offsets not rising, no document, schemas that differ.
  explicit ShardSet(const std::filesystem::path& path);

  const Schema& schema() const { return schema_; }
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t document_length(int64_t index) const;  // stored tokens
  int64_t num_items() const { return num_items_; }
  Item item(int64_t index) const;
  // Segments in order, adjacent ones of different modality. UserError names file and document: an id or a modality out
  // of range, a code at a place of another codebook, a broken item.
  std::vector<Segment> document(int64_t index) const;
  // The same segments with their ids unread: reads the modalities alone. UserError: a modality out of range, a broken
  // item.
  std::vector<Segment> runs(int64_t index) const;
  void validate() const;  // reads every document
  // What made the shards, by name ("tokenizer", "codec.image"), where they say so.
  const std::map<std::string, std::string>& fingerprints() const { return fingerprints_; }
  // What was skipped when they were made, by name ("bad_rows", "skipped_images", "skipped_documents"), where they say
  // so.
  const std::map<std::string, int64_t>& counts() const { return counts_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  struct Shard {
    io::SafetensorsFile file;
    at::Tensor ids_T, modality_T, offsets, item_offsets;  // the last undefined where every document is an item
    int64_t first_document = 0, num_documents = 0, first_item = 0;
  };
  const Shard& shard_of(int64_t& index) const;  // makes `index` local
  void open(const std::filesystem::path& file);
  void check_whole() const;
  std::filesystem::path path_;
  Schema schema_;
  std::vector<Shard> shards_;
  std::map<std::string, std::string> fingerprints_;
  std::map<std::string, int64_t> counts_;
  int64_t num_documents_ = 0, num_tokens_ = 0, num_items_ = 0;
};

// Writes shard-00000.safetensors, shard-00001.safetensors, … into a folder, which appears whole when it is finished.
class ShardWriter {
 public:
  // UserError when the folder already holds shards and overwrite is false, or holds anything else. max_tokens: a file
  // is closed once it holds so many. metadata: further entries for every file.
  ShardWriter(const std::filesystem::path& folder, Schema schema, bool overwrite = false, int64_t max_tokens = 1 << 26,
              std::map<std::string, std::string> metadata = {});
  // UserError on an id out of range or of another codebook than its place's; empty documents are refused. same_item: it
  // is the item of the document before it.
  void add(const std::vector<Segment>& document, bool same_item = false);
  // Writes the last file, and puts the folder in the place of what was there, if that may still be replaced.
  // last_metadata: further entries for it. UserError when no document was added, or when the folder holds by now what
  // the constructor refuses.
  void finish(const std::map<std::string, std::string>& last_metadata = {});
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  void check_replace() const;
  void flush(const std::map<std::string, std::string>& further = {});
  io::StagedFolder folder_;
  Schema schema_;
  bool overwrite_;
  int64_t max_tokens_, num_files_ = 0, num_documents_ = 0, num_tokens_ = 0;
  std::map<std::string, std::string> metadata_;
  std::vector<int32_t> ids_;
  std::vector<uint8_t> modality_;
  std::vector<int64_t> offsets_{0}, item_offsets_{0};
};

}  // namespace moegraft::data
