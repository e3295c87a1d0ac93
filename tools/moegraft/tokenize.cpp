// moegraft tokenize: text <-> ids, and `tokenize train`.
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tools {

namespace {

using tokenizer::SentencePieceTraining;

struct Options {
  std::string model, text, file;
  std::vector<int64_t> ids;
  bool json = false, special = false;
  std::vector<std::string> train_text;
  std::string train_out;
  SentencePieceTraining training;
  CLI::Option *has_text = nullptr, *has_file = nullptr, *has_ids = nullptr;
};

std::string read_input(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::ifstream in(path, std::ios::binary);
  MOEGRAFT_CHECK(in, path, ": cannot read the text file");
  return {std::istreambuf_iterator<char>(in), {}};
}

void print_ids(const Options& o) {
  const auto tokenizer = tokenizer::load_tokenizer(o.model);
  const bool decoding = o.has_ids->count() > 0;
  std::string text = o.text;
  std::vector<int64_t> ids = o.ids;
  if (decoding) {
    text = tokenizer->decode(ids, !o.special);
  } else {
    if (o.has_file->count()) text = read_input(o.file);
    ids = tokenizer->encode(text, o.special);
  }
  if (o.json) {
    nlohmann::ordered_json out = {
        {"ids", ids}, {"pieces", nlohmann::json::array()}, {"text", text}, {"vocab_size", tokenizer->size()}};
    for (const auto id : ids) out["pieces"].push_back(tokenizer->piece_of(id));
    std::cout << out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
  } else if (decoding) {
    std::cout << text << '\n';
  } else {
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i ? "," : "") << ids[i];
    std::cout << '\n';
  }
}

void train(const Options& o) {
  tokenizer::train_sentencepiece({o.train_text.begin(), o.train_text.end()}, o.train_out, o.training);
  const auto tokenizer = tokenizer::load_tokenizer(o.train_out);
  if (o.json) {
    std::cout << nlohmann::ordered_json{{"dir", o.train_out},
                                        {"type", o.training.model_type},
                                        {"vocab_size", tokenizer->size()}}
                     .dump()
              << '\n';
  } else {
    log::info("wrote ", o.train_out, "/tokenizer.model, tokenizer.json, tokenizer_config.json (", tokenizer->size(),
              " pieces)");
  }
}

}  // namespace

void add_tokenize_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  auto* command = app.add_subcommand("tokenize", "Text to token ids and back; `tokenize train` makes a tokenizer");
  command->footer(
      "Examples:\n  moegraft tokenize models/base --text 'a red heart'\n  moegraft tokenize models/base --ids "
      "1,274,2891\n"
      "  moegraft tokenize train --text corpus.txt -o models/tokenizer --vocab-size 4096 --type bpe");
  command->add_option("model", o->model, "Model folder, tokenizer.json or tokenizer.model");
  o->has_text = command->add_option("--text", o->text, "Text to encode");
  o->has_file = command->add_option("--file", o->file, "File to encode (- is standard input)");
  o->has_ids = command->add_option("--ids", o->ids, "Ids to decode, separated by commas")->delimiter(',');
  command->add_flag("--special", o->special,
                    "Encoding: add BOS/EOS as the tokenizer defines; decoding: keep special tokens");
  command->add_flag("--json", o->json, "One JSON object: ids, pieces, text, vocab_size");

  auto* training = command->add_subcommand("train", "Train a sentencepiece tokenizer that transformers loads too");
  training->footer(
      "Example:\n  moegraft tokenize train --text a.txt b.txt -o models/tokenizer --vocab-size 2048 --type bpe");
  training->add_option("--text", o->train_text, "Text files, one sentence a line")->required();
  training->add_option("-o,--out", o->train_out, "Folder to write")->required();
  training->add_option("--vocab-size", o->training.vocab_size, "Number of pieces")->capture_default_str();
  training->add_option("--type", o->training.model_type, "bpe or unigram")->capture_default_str();
  training
      ->add_option("--coverage", o->training.character_coverage,
                   "Share of the characters that get a piece of their own")
      ->capture_default_str();
  training->add_option("--max-sentences", o->training.max_sentences, "Train on a sample of this many lines (0: all)")
      ->capture_default_str();
  training->add_option("--seed", o->training.seed, "Seed of the sample")->capture_default_str();
  training->add_flag("!--no-byte-fallback", o->training.byte_fallback,
                     "Characters without a piece become <unk> instead of bytes");
  training->add_flag("!--no-dummy-prefix", o->training.add_dummy_prefix, "No space before the text");
  training->add_flag("!--no-split-digits", o->training.split_digits, "Allow pieces of several digits");
  training->add_flag("--json", o->json, "Print a JSON object");
  training->callback([o] { train(*o); });

  command->callback([o, command] {
    if (!command->get_subcommands().empty()) return;
    MOEGRAFT_CHECK_USAGE(!o->model.empty(),
                         "tokenize: name a model folder (or the subcommand train); see moegraft tokenize --help");
    const auto inputs = (o->has_text->count() > 0) + (o->has_file->count() > 0) + (o->has_ids->count() > 0);
    MOEGRAFT_CHECK_USAGE(inputs == 1, "tokenize: give exactly one of --text, --file, --ids, got ", inputs);
    print_ids(*o);
  });
}

}  // namespace moegraft::tools
