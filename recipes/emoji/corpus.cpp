#include "emoji/corpus.h"

#include <algorithm>
#include <charconv>
#include <pugixml.hpp>
#include <sstream>
#include <vector>

#include "emoji/emoji.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/data/unicode.h"
#include "moegraft/io/files.h"

namespace moegraft::emoji {
namespace {

// A synset line of wndb(5WN): offset file type w_cnt(hex) word lex_id word lex_id … | gloss. Adjectives may carry "(p)"
// behind the word.
std::string wordnet_document(const std::string& line, const std::string& where) {
  const size_t bar = line.find(" | ");
  std::istringstream fields(line.substr(0, bar));
  std::string offset, file, type, count_text, word, lex_id;
  fields >> offset >> file >> type >> count_text;
  int count = 0;
  const auto [end, error] = std::from_chars(count_text.data(), count_text.data() + count_text.size(), count, 16);
  MOEGRAFT_CHECK(
      bar != std::string::npos && error == std::errc() && end == count_text.data() + count_text.size() && count > 0,
      where, ": not a WordNet synset line");
  std::vector<std::string> words;
  for (int i = 0; i < count && fields >> word >> lex_id; ++i) {
    if (const size_t marker = word.find('('); marker != std::string::npos && marker > 0) word.resize(marker);
    std::replace(word.begin(), word.end(), '_', ' ');
    words.push_back(word);
  }
  return data::plain_lower(join(words, ", ") + ": " + line.substr(bar + 3));
}

void add_wordnet(const std::filesystem::path& folder, std::vector<std::string>& documents) {
  for (const char* name : {"data.noun", "data.verb", "data.adj", "data.adv"}) {
    const auto path = folder / name;
    MOEGRAFT_CHECK(std::filesystem::is_regular_file(path), "WordNet not found: ", path.string(),
                   " (Debian: apt install wordnet-base, or name another folder with --wordnet)");
    std::istringstream lines(io::read_file(path));
    int64_t number = 0;
    for (std::string line; std::getline(lines, line);) {
      ++number;
      if (line.empty() || line[0] == ' ') continue;  // the licence at the top is indented
      documents.push_back(wordnet_document(line, path.string() + ":" + std::to_string(number)));
    }
  }
}

void add_emoji(const CorpusOptions& options, std::vector<std::string>& documents) {
  const auto entries = read_emoji_annotations(options.annotations, options.language);
  for (int64_t round = 0; round < options.repeat_emoji; ++round) {
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto& keywords = entries[i].keywords;
      std::vector<std::string> shuffled;
      for (int64_t k : Rng(options.seed, "corpus.keywords", static_cast<uint64_t>(round) * entries.size() + i)
                           .permutation(static_cast<int64_t>(keywords.size())))
        shuffled.push_back(keywords[k]);
      documents.push_back(shuffled.empty() ? entries[i].name : entries[i].name + ": " + join(shuffled, ", "));
    }
  }
}

void append_text(const pugi::xml_node& node, std::string& out) {
  if (node.type() == pugi::node_pcdata || node.type() == pugi::node_cdata) out += node.value();
  for (const auto& child : node.children()) append_text(child, out);
}

void add_handbook(const std::filesystem::path& folder, std::vector<std::string>& documents) {
  MOEGRAFT_CHECK(std::filesystem::is_directory(folder), "handbook not found: ", folder.string(),
                 " (Debian: apt install debian-handbook)");
  std::vector<std::filesystem::path> pages;
  for (const auto& item : std::filesystem::directory_iterator(folder))
    if (item.path().extension() == ".html") pages.push_back(item.path());
  std::sort(pages.begin(), pages.end());
  for (const auto& page : pages) {
    pugi::xml_document html;
    const auto result = html.load_file(page.c_str());
    MOEGRAFT_CHECK(result, page.string(), " is not well-formed XHTML at byte ", result.offset, ": ",
                   result.description());
    for (const auto& node : html.select_nodes("//div[@class='para']")) {
      std::string text;
      append_text(node.node(), text);
      text = data::plain_lower(text);
      if (text.size() >= 40) documents.push_back(text);
    }
  }
}

int64_t write_lines(const std::filesystem::path& path, const std::vector<std::string>& lines) {
  std::string text;
  for (const auto& line : lines) (text += line) += '\n';
  io::write_file_atomic(path, text);
  return static_cast<int64_t>(text.size());
}

std::vector<std::string> shuffled(const std::vector<std::string>& documents, uint64_t seed, std::string_view purpose) {
  std::vector<std::string> out;
  for (int64_t i : Rng(seed, purpose).permutation(static_cast<int64_t>(documents.size()))) out.push_back(documents[i]);
  return out;
}

}  // namespace

CorpusSummary prepare_corpus(const CorpusOptions& options) {
  MOEGRAFT_CHECK_USAGE(options.eval_share >= 0 && options.eval_share < 1, "--eval-share must be in [0, 1), got ",
                       options.eval_share);
  MOEGRAFT_CHECK_USAGE(options.repeat_emoji >= 0 && options.repeat_emoji <= 1000,
                       "--repeat-emoji must be in [0, 1000], got ", options.repeat_emoji);
  std::vector<std::string> documents, train, eval;
  add_wordnet(options.wordnet, documents);
  if (!options.handbook.empty()) add_handbook(options.handbook, documents);
  // Only text that comes once is held out: a repeated line would be seen in training.
  const auto order = shuffled(documents, options.seed, "corpus.split");
  const size_t held_out = static_cast<size_t>(options.eval_share * static_cast<double>(order.size()));
  eval.assign(order.begin(), order.begin() + static_cast<int64_t>(held_out));
  train.assign(order.begin() + static_cast<int64_t>(held_out), order.end());
  add_emoji(options, train);
  train = shuffled(train, options.seed, "corpus.train");
  if (options.limit > 0) {
    train.resize(std::min<size_t>(train.size(), options.limit));
    eval.resize(std::min<size_t>(eval.size(), options.limit));
  }
  std::filesystem::create_directories(options.output);
  CorpusSummary summary;
  summary.train_documents = static_cast<int64_t>(train.size());
  summary.eval_documents = static_cast<int64_t>(eval.size());
  summary.train_bytes = write_lines(options.output / "train.txt", train);
  summary.eval_bytes = write_lines(options.output / "eval.txt", eval);
  return summary;
}

}  // namespace moegraft::emoji
