#include "emoji/emoji.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <fstream>

#include "emoji/font.h"
#include "emoji/probes.h"
#include "emoji/splits.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/data/unicode.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"
#include "moegraft/io/rows.h"

namespace moegraft::emoji {
namespace {

std::string manifest_line(const EmojiEntry& entry, const std::string& text, const std::vector<std::string>& captions) {
  const io::Json line = {{"image", "images/" + entry.file_stem() + ".png"},
                         {"text", text},
                         {"captions", captions},
                         {"keywords", entry.keywords},
                         {"emoji", entry.utf8},
                         {"concept", entry.concept_name}};
  return line.dump() + "\n";
}

// Without fsync: thousands of small files would take a minute. The manifests come last and are durable.
void write_picture(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  file.close();
  MOEGRAFT_CHECK(file.good(), "cannot write ", path.string(), " (is the disk full?)");
}

std::vector<std::string> read_text_lines(const std::filesystem::path& path) {
  MOEGRAFT_CHECK_USAGE(std::filesystem::is_regular_file(path), "--running-text: no such file: ", path.string());
  std::vector<std::string> lines;
  const std::string text = io::read_file(path);
  io::check_utf8(text, path.string());
  for (const auto& line : split(text, '\n'))
    if (auto text = trim(data::plain_lower(line)); !text.empty()) lines.push_back(std::move(text));
  MOEGRAFT_CHECK_USAGE(!lines.empty(), "--running-text: ", path.string(), " holds no text");
  return lines;
}

}  // namespace

EmojiSummary prepare_emoji(const EmojiOptions& options) {
  MOEGRAFT_CHECK_USAGE(options.size >= 4 && options.size <= 4096, "--size must be in [4, 4096], got ", options.size);
  MOEGRAFT_CHECK_USAGE(options.holdout >= 0 && options.holdout < 1, "--holdout must be in [0, 1), got ",
                       options.holdout);
  MOEGRAFT_CHECK_USAGE(!options.output.empty(), "-o must name a folder to write");
  const auto synonyms =
      options.synonyms.empty() ? std::map<std::string, std::string>() : read_synonyms(options.synonyms);
  const auto running_text =
      options.running_text.empty() ? std::vector<std::string>() : read_text_lines(options.running_text);
  const EmojiFont font(options.font);
  EmojiSummary summary;
  std::vector<EmojiEntry> entries;
  std::vector<uint32_t> glyphs;
  for (auto& entry : read_emoji_annotations(options.annotations, options.language)) {
    const uint32_t glyph = font.glyph(entry.code_points);
    if (glyph == 0) {
      ++summary.without_glyph;
      continue;
    }
    entries.push_back(std::move(entry));
    glyphs.push_back(glyph);
  }
  MOEGRAFT_CHECK(!entries.empty(), options.font.string(), " draws none of the annotated emoji");
  const auto splits = split_emoji(entries, options.holdout, options.seed);
  const auto popular = popular_emoji(entries, splits, options.popular, options.seed);

  // A limit keeps the popular ones first, then code point order.
  std::vector<int64_t> order = popular;
  std::vector<bool> listed(entries.size(), false), keep(entries.size(), false);
  for (int64_t i : popular) listed[i] = true;
  for (size_t i = 0; i < entries.size(); ++i)
    if (!listed[i]) order.push_back(static_cast<int64_t>(i));
  if (options.limit > 0 && options.limit < static_cast<int64_t>(order.size())) order.resize(options.limit);

  std::filesystem::create_directories(options.output / "images");
  Progress progress("emoji", static_cast<int64_t>(order.size()));
  constexpr size_t kChunk = 128;
  for (size_t begin = 0; begin < order.size(); begin += kChunk) {
    const size_t end = std::min(begin + kChunk, order.size());
    std::vector<at::Tensor> pictures;  // a FreeType face is not for several threads
    for (size_t n = begin; n < end; ++n) pictures.push_back(font.picture(glyphs[order[n]]));
    at::parallel_for(0, static_cast<int64_t>(end - begin), 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        if (!pictures[n].defined()) continue;
        const auto path = options.output / "images" / (entries[order[begin + n]].file_stem() + ".png");
        write_picture(path, io::png_bytes(io::resize_and_pad(pictures[n], options.size)));
      }
    });
    for (size_t n = begin; n < end; ++n) {
      keep[order[n]] = pictures[n - begin].defined();
      if (!keep[order[n]]) ++summary.without_glyph;
    }
    progress.update(static_cast<int64_t>(end));
  }
  progress.finish();

  const auto uses = count_keywords(entries);
  // The probes of the popular ones, and the words that no training caption of their picture may hold.
  std::string popular_lines, paraphrases, synonym_lines, templates;
  std::map<int64_t, std::set<std::string>> withheld;
  for (int64_t i : popular) {
    if (!keep[i]) continue;
    const auto& entry = entries[i];
    const auto probe = [&](const std::string& text, std::string& lines, int64_t& count) {
      lines += manifest_line(entry, text, {text});
      ++count;
    };
    if (const auto found = synonyms.find(entry.name); found != synonyms.end()) {
      withheld[i].merge(word_set(found->second));
      probe(found->second, synonym_lines, summary.synonyms);
    }
    if (const auto chosen = paraphrase(entry, uses, options.seed); !chosen.empty()) {
      withheld[i].merge(word_set(join(chosen, " ")));
      probe(join(chosen, ", "), paraphrases, summary.paraphrases);
    }
    probe(in_new_sentence(entry.name, summary.popular), templates, summary.templates);
    popular_lines += manifest_line(entry, entry.name, emoji_captions(entry, withheld[i]));
    ++summary.popular;
  }

  if (const int64_t lost = static_cast<int64_t>(synonyms.size()) - summary.synonyms; lost > 0)
    log::warning(options.synonyms.string(), ": ", lost, " of ", synonyms.size(),
                 " names are of no popular picture, and their synonyms are left out");

  std::string train, heldout, compositions;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (!keep[i]) continue;
    ++summary.pictures;
    const auto found = withheld.find(static_cast<int64_t>(i));
    const auto& not_said = found == withheld.end() ? std::set<std::string>() : found->second;
    auto captions = emoji_captions(entries[i], not_said);
    if (splits[i] == EmojiSplit::train && !running_text.empty())
      for (auto& caption : captions_in_text(entries[i], not_said, running_text, options.seed))
        if (std::find(captions.begin(), captions.end(), caption) == captions.end())
          captions.push_back(std::move(caption));
    const std::string line = manifest_line(entries[i], entries[i].name, captions);
    switch (splits[i]) {
      case EmojiSplit::train: train += line, ++summary.train; break;
      case EmojiSplit::heldout: heldout += line, ++summary.heldout; break;
      case EmojiSplit::composition: compositions += line, ++summary.compositions; break;
    }
  }
  io::write_file_atomic(options.output / "train.jsonl", train);
  io::write_file_atomic(options.output / "heldout.jsonl", heldout);
  io::write_file_atomic(options.output / "compositions.jsonl", compositions);
  io::write_file_atomic(options.output / "popular.jsonl", popular_lines);
  io::write_file_atomic(options.output / "paraphrases.jsonl", paraphrases);
  io::write_file_atomic(options.output / "synonyms.jsonl", synonym_lines);
  io::write_file_atomic(options.output / "templates.jsonl", templates);
  for (const auto& [language, file] : {std::pair("de", "german.jsonl"), {"fr", "french.jsonl"}}) {
    if (language == options.language ||
        !std::filesystem::exists(options.annotations / "annotations" / (std::string(language) + ".xml")))
      continue;
    std::map<std::u32string, std::string> names;
    for (const auto& entry : read_emoji_annotations(options.annotations, language))
      names[entry.code_points] = entry.name;
    std::string lines;
    for (int64_t i : popular)
      if (const auto found = names.find(entries[i].code_points); keep[i] && found != names.end())
        lines += manifest_line(entries[i], found->second, {found->second});
    io::write_file_atomic(options.output / file, lines);
  }
  return summary;
}

}  // namespace moegraft::emoji
