#include "moegraft/data/prepare.h"

#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/codec/codec.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/manifest.h"
#include "moegraft/data/shard.h"
#include "moegraft/data/unicode.h"
#include "moegraft/io/image.h"
#include "moegraft/io/rows.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::data {
namespace {

// The first few of things that are skipped, each kind, are warnings; the rest is for who wants to know (-v).
void tell_skipped(int64_t before, const std::string& why) {
  constexpr int64_t kNamed = 5;
  if (before < kNamed)
    log::warning("skipped: ", why);
  else
    log::debug("skipped: ", why);
}
using Codes = std::map<io::Picture, std::vector<int32_t>>;  // absent: the picture did not decode

// A modality of the set: the codec of its images, and what it makes of them.
struct Encoded {
  std::string name;
  std::filesystem::path dir;
  std::unique_ptr<codec::ImageCodec> codec;
  std::vector<io::Picture> pictures;  // each once
  Codes codes = {};
};

void check_name(const std::string& name, const char* option) {
  MOEGRAFT_CHECK_USAGE(
      !name.empty() && name != "text" && name.find_first_of(",\"\\\n") == std::string::npos, option,
      " must name the pictures' modality as the run's `modalities` does, other than text and without a comma, got \"",
      name, "\"");
}

// The modalities that the entries hold, the one of images without a name first, with their codecs.
std::vector<Encoded> load_modalities(const std::vector<ManifestEntry>& entries, const ShardOptions& options) {
  MOEGRAFT_CHECK_USAGE(!options.codecs.contains(options.modality), "--codec-of ", options.modality,
                       " is given by --codec and --modality already; name another modality");
  std::map<std::string, std::set<io::Picture>> pictures;
  for (const auto& entry : entries)
    for (const auto& segment : entry.segments)
      if (segment.is_image())
        pictures[segment.modality.empty() ? options.modality : segment.modality].insert(segment.image);
  std::vector<Encoded> modalities;
  const auto load = [&](const std::string& name, const std::filesystem::path& dir) {
    const auto found = pictures.find(name);
    if (found == pictures.end()) return;
    modalities.push_back(
        {name, dir, codec::load_codec(dir), std::vector<io::Picture>(found->second.begin(), found->second.end())});
    pictures.erase(found);
  };
  MOEGRAFT_CHECK_USAGE(!pictures.contains(options.modality) || !options.codec.empty(),
                       "the manifest holds images: name the folder of their codec with --codec");
  load(options.modality, options.codec);
  for (const auto& [name, dir] : options.codecs) load(name, dir);
  if (!pictures.empty()) {
    const std::string& name = pictures.begin()->first;
    fail<UsageError>("the manifest holds images of the modality \"", name,
                     "\": name the folder of their codec with --codec-of ", name, "=DIR");
  }
  return modalities;
}

Codes encode_images(const std::vector<io::Picture>& pictures, const codec::ImageCodec& codec, int64_t batch_size,
                    bool strict, ShardSummary& summary) {
  at::NoGradGuard no_grad;
  Codes codes;
  std::vector<io::Picture> places;
  std::vector<at::Tensor> batch;
  auto flush = [&] {
    if (batch.empty()) return;
    const auto ids_BL = codec.encode(at::stack(batch)).to(at::kCPU, at::kInt).contiguous();
    const int64_t length = ids_BL.size(1);
    const auto* ids = ids_BL.const_data_ptr<int32_t>();
    for (size_t i = 0; i < places.size(); ++i) codes[places[i]].assign(ids + i * length, ids + (i + 1) * length);
    summary.images += static_cast<int64_t>(places.size());
    places.clear();
    batch.clear();
  };
  Progress progress("images", static_cast<int64_t>(pictures.size()));
  for (size_t i = 0; i < pictures.size(); ++i) {
    std::optional<at::Tensor> pixels;
    try {
      pixels = codec.prepare(io::load_image(pictures[i]));
    } catch (const io::SourceChanged&) { throw; } catch (const UserError& e) {
      if (strict) throw;
      tell_skipped(summary.skipped_images++, e.what());
    }
    if (pixels) {
      places.push_back(pictures[i]);
      batch.push_back(*pixels);
    }
    if (static_cast<int64_t>(batch.size()) >= batch_size) flush();
    progress.update(static_cast<int64_t>(i) + 1);
  }
  flush();
  progress.finish();
  return codes;
}

class Encoder {
 public:
  Encoder(const ShardOptions& options, const tokenizer::Tokenizer& tokenizer, const std::vector<Encoded>& modalities,
          ShardWriter& writer, ShardSummary& summary)
      : options_(options), tokenizer_(tokenizer), modalities_(modalities), writer_(writer), summary_(summary) {}

  // False: it is skipped.
  bool add(const std::vector<ManifestSegment>& segments, bool same_item = false) {
    std::vector<std::vector<int32_t>> owned;
    std::vector<int64_t> modality;
    for (const auto& segment : segments) {
      if (segment.is_image()) {
        const size_t m = find_modality(segment.modality.empty() ? options_.modality : segment.modality);
        const auto found = modalities_[m].codes.find(segment.image);
        if (found == modalities_[m].codes.end()) return skip();
        owned.push_back(found->second);
        modality.push_back(static_cast<int64_t>(m) + 1);
        continue;
      }
      const auto ids = tokenizer_.encode(options_.lowercase ? plain_lower(segment.text) : segment.text);
      summary_.text_tokens += static_cast<int64_t>(ids.size());
      if (ids.empty()) continue;
      owned.emplace_back(ids.begin(), ids.end());
      modality.push_back(0);
    }
    std::vector<Segment> document;
    for (size_t i = 0; i < owned.size(); ++i) document.push_back({modality[i], owned[i]});
    if (document.empty()) return skip();
    writer_.add(document, same_item);
    return true;
  }

  void add(const ManifestEntry& entry) {
    const bool captioned = !entry.captions.empty();
    const size_t count = !captioned ? 1 : options_.captions == "all" ? entry.captions.size() : 1;
    bool begun = false;
    for (size_t i = 0; i < count; ++i) {
      auto segments = entry.segments;
      if (captioned) segments.front().text = options_.prefix + entry.captions[i] + options_.suffix;
      begun |= add(segments, begun);
    }
  }

 private:
  size_t find_modality(const std::string& name) const {
    for (size_t m = 0; m < modalities_.size(); ++m)
      if (modalities_[m].name == name) return m;
    fail<InvariantError>("no codec for the modality ", name);
  }
  bool skip() {
    ++summary_.skipped_documents;
    return false;
  }
  const ShardOptions& options_;
  const tokenizer::Tokenizer& tokenizer_;
  const std::vector<Encoded>& modalities_;
  ShardWriter& writer_;
  ShardSummary& summary_;
};

}  // namespace

ShardSummary prepare_shards(const ShardOptions& options) {
  MOEGRAFT_CHECK_USAGE(!options.manifests.empty() || !options.texts.empty(),
                       "nothing to prepare: give --manifest or --text");
  MOEGRAFT_CHECK_USAGE(!options.output.empty(), "-o must name a folder to write");
  MOEGRAFT_CHECK_USAGE(options.captions == "text" || options.captions == "all", "--captions must be text or all, got ",
                       options.captions);
  MOEGRAFT_CHECK_USAGE(options.batch_size > 0, "--batch-size must be positive, got ", options.batch_size);
  MOEGRAFT_CHECK_USAGE(options.max_tokens > 0, "--max-tokens must be positive, got ", options.max_tokens);
  check_name(options.modality, "--modality");
  for (const auto& [name, dir] : options.codecs) check_name(name, "--codec-of");
  const auto tokenizer = tokenizer::load_tokenizer(options.tokenizer);
  for (const auto& path : options.texts) {
    MOEGRAFT_CHECK_USAGE(std::filesystem::is_regular_file(path), "text file not found: ", path.string());
    MOEGRAFT_CHECK_USAGE(!io::is_row_format(path), path.string(),
                         " is a data set, whose rows are not lines of text: name it by --manifest");
  }
  ShardSummary summary;
  std::vector<ManifestEntry> entries;
  for (const auto& path : options.manifests) {
    auto read = read_manifest(
        path, options.strict ? BadRow() : [&](const std::string& why) { tell_skipped(summary.bad_rows++, why); },
        options.columns);
    std::move(read.begin(), read.end(), std::back_inserter(entries));
  }
  std::vector<Encoded> modalities = load_modalities(entries, options);
  Schema schema{{{"text", tokenizer->size(), 0}}};
  std::map<std::string, std::string> made_with{{"fingerprint.tokenizer", tokenizer_fingerprint(*tokenizer)}};
  for (const auto& m : modalities) {
    const codec::CodeShape shape = m.codec->shape();
    schema.modalities.push_back({m.name, m.codec->num_codes(), shape.item_length(), shape.codebooks, shape.positions});
    made_with["fingerprint.codec." + m.name] = codec_fingerprint(m.dir);
  }
  ShardWriter writer(options.output, schema, options.overwrite, options.max_tokens,
                     made_with);  // before the pictures are encoded: a folder in use is said at once
  for (auto& m : modalities) m.codes = encode_images(m.pictures, *m.codec, options.batch_size, options.strict, summary);
  Encoder encoder(options, *tokenizer, modalities, writer, summary);
  for (const auto& entry : entries) encoder.add(entry);
  for (const auto& path : options.texts) {
    std::ifstream file(path);
    MOEGRAFT_CHECK(file.good(), "cannot read ", path.string());
    int64_t done = 0;
    const int64_t total = static_cast<int64_t>(std::filesystem::file_size(path));
    Progress progress(path.filename().string(), total);
    int64_t number = 0;
    for (std::string line; std::getline(file, line);) {
      ++number;
      done += static_cast<int64_t>(line.size()) + 1;
      progress.update(std::min(done, total));
      line = trim(line);
      try {
        io::check_utf8(line, path.string() + ":" + std::to_string(number));
      } catch (const UserError& e) {
        if (options.strict) throw;
        tell_skipped(summary.bad_rows++, e.what());
        continue;
      }
      if (!line.empty()) encoder.add(std::vector<ManifestSegment>{{line, {}}});
    }
    progress.finish();
  }
  const int64_t lost = summary.bad_rows + summary.skipped_documents;
  if (lost > 0)
    log::warning(lost, " documents are skipped: ", summary.bad_rows, " rows that cannot be read, ",
                 summary.skipped_documents,
                 " with pictures that do not decode or without a token (moegraft -v names all of them, --strict ends "
                 "at the first)");
  MOEGRAFT_CHECK(
      lost <= writer.num_documents(), lost, " of ", lost + writer.num_documents(),
      " documents would be skipped, more than half: nothing is written; mend the data, or take the bad rows out");
  writer.finish({{"counts.bad_rows", std::to_string(summary.bad_rows)},
                 {"counts.skipped_images", std::to_string(summary.skipped_images)},
                 {"counts.skipped_documents", std::to_string(summary.skipped_documents)}});
  summary.documents = writer.num_documents();
  summary.tokens = writer.num_tokens();
  return summary;
}

}  // namespace moegraft::data
