#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "data_deal.h"
#include "emoji/corpus.h"
#include "emoji/emoji.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/prepare.h"
#include "moegraft/data/shard.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::ordered_json;

void report(const Json& result, bool as_json, const std::string& text) {
  if (as_json)
    std::cout << result.dump() << std::endl;
  else
    log::info(text);
}

void add_emoji(CLI::App& parent) {
  struct State {
    emoji::EmojiOptions options;
    bool json = false;
  };
  auto state = std::make_shared<State>();
  auto& o = state->options;
  auto* command = parent.add_subcommand("emoji", "Pictures of Noto Color Emoji with CLDR names and keywords");
  command->add_option("-o,--output", o.output, "Folder to write")->required();
  command->add_option("--size", o.size, "Pixels a side, on white")->capture_default_str();
  command->add_option("--limit", o.limit, "Only so many pictures, well-known ones first; 0: all")
      ->capture_default_str();
  command->add_option("--popular", o.popular, "Pictures in popular.jsonl")->capture_default_str();
  command->add_option("--holdout", o.holdout, "Share of concepts held out")->capture_default_str();
  command->add_option("--seed", o.seed, "Seed of the splits")->capture_default_str();
  command->add_option("--font", o.font, "Colour-bitmap font")->capture_default_str();
  command->add_option("--annotations", o.annotations, "CLDR folder that holds annotations/ and annotationsDerived/")
      ->capture_default_str();
  command->add_option("--language", o.language, "CLDR language")->capture_default_str();
  command->add_option(
      "--running-text", o.running_text,
      "Text file: what trains is also described within pieces of its lines, and by more sets of keywords");
  command->add_option(
      "--synonyms", o.synonyms,
      "Lines \"name<TAB>other words\": synonyms.jsonl, and no training caption of these pictures has the words");
  command->add_flag("--json", state->json, "Print the summary as one JSON object");
  command->footer(
      "Example:\n  moegraft data prepare emoji -o data/emoji --size 36\n  -> data/emoji/{images/, "
      "train,heldout,compositions,popular}.jsonl, and probes {paraphrases,synonyms,templates,german,french}.jsonl");
  command->callback([state] {
    const auto s = emoji::prepare_emoji(state->options);
    report(
        {{"pictures", s.pictures},
         {"train", s.train},
         {"heldout", s.heldout},
         {"compositions", s.compositions},
         {"popular", s.popular},
         {"paraphrases", s.paraphrases},
         {"synonyms", s.synonyms},
         {"templates", s.templates},
         {"without_glyph", s.without_glyph}},
        state->json,
        detail::concat(s.pictures, " pictures in ", state->options.output.string(), ": ", s.train, " to train (",
                       s.popular, " of them popular), ", s.heldout, " held out, ", s.compositions,
                       " held-out compositions; probes: ", s.paraphrases, " paraphrases, ", s.synonyms, " synonyms, ",
                       s.templates, " new sentences; ", s.without_glyph, " annotated sequences have no picture"));
  });
}

void add_corpus(CLI::App& parent) {
  struct State {
    emoji::CorpusOptions options;
    bool json = false;
  };
  auto state = std::make_shared<State>();
  auto& o = state->options;
  auto* command =
      parent.add_subcommand("corpus", "English text of Debian packages: WordNet glosses, emoji names and keywords");
  command->add_option("-o,--output", o.output, "Folder to write")->required();
  command->add_option("--wordnet", o.wordnet, "Folder of data.noun, data.verb, data.adj, data.adv")
      ->capture_default_str();
  command->add_option("--annotations", o.annotations, "CLDR folder that holds annotations/ and annotationsDerived/")
      ->capture_default_str();
  command->add_option("--handbook", o.handbook,
                      "Folder of HTML pages to add, such as /usr/share/doc/debian-handbook/html/en-US");
  command->add_option("--repeat-emoji", o.repeat_emoji, "Times the emoji names and keywords come")
      ->capture_default_str();
  command->add_option("--eval-share", o.eval_share, "Share of the other documents kept for evaluation")
      ->capture_default_str();
  command->add_option("--limit", o.limit, "Only so many documents; 0: all")->capture_default_str();
  command->add_option("--seed", o.seed, "Seed of the split and the order")->capture_default_str();
  command->add_flag("--json", state->json, "Print the summary as one JSON object");
  command->footer(
      "Example:\n  moegraft data prepare corpus -o data/corpus\n  -> data/corpus/train.txt, eval.txt, one document a "
      "line");
  command->callback([state] {
    const auto s = emoji::prepare_corpus(state->options);
    report({{"train_documents", s.train_documents},
            {"train_bytes", s.train_bytes},
            {"eval_documents", s.eval_documents},
            {"eval_bytes", s.eval_bytes}},
           state->json,
           detail::concat(state->options.output.string(), ": ", s.train_documents, " documents (", s.train_bytes,
                          " bytes) to train, ", s.eval_documents, " (", s.eval_bytes, " bytes) to evaluate"));
  });
}

struct ShardState {
  data::ShardOptions options;
  std::vector<std::string> codecs;  // NAME=DIR
  bool json = false;
};

std::map<std::string, std::filesystem::path> parse_codecs(const std::vector<std::string>& pairs) {
  std::map<std::string, std::filesystem::path> codecs;
  for (const auto& pair : pairs) {
    const size_t at = pair.find('=');
    MOEGRAFT_CHECK_USAGE(at != std::string::npos && at > 0 && at + 1 < pair.size(),
                         "--codec-of must be NAME=DIR, such as sketch=models/sketch, got ", pair);
    const bool fresh = codecs.emplace(pair.substr(0, at), pair.substr(at + 1)).second;
    MOEGRAFT_CHECK_USAGE(fresh, "--codec-of names ", pair.substr(0, at), " twice; give one codec for each modality");
  }
  return codecs;
}

void add_shard_options(CLI::App& command, const std::shared_ptr<ShardState>& state) {
  auto& o = state->options;
  command.add_option("--tokenizer", o.tokenizer, "Folder of the text tokenizer (or of the model)")->required();
  command.add_option("-o,--output", o.output, "Folder to write shards to")->required();
  command.add_option("--max-tokens", o.max_tokens, "Tokens in one shard file")->capture_default_str();
  command.add_flag("--lowercase", o.lowercase, "Lower-case the text first");
  command.add_flag("--overwrite", o.overwrite, "Replace shards that are already there");
  command.add_flag("--json", state->json, "Print the summary as one JSON object");
  command.callback([state] {
    state->options.codecs = parse_codecs(state->codecs);
    const auto s = data::prepare_shards(state->options);
    report({{"documents", s.documents},
            {"tokens", s.tokens},
            {"text_tokens", s.text_tokens},
            {"images", s.images},
            {"skipped_images", s.skipped_images},
            {"skipped_documents", s.skipped_documents},
            {"bad_rows", s.bad_rows}},
           state->json,
           detail::concat(state->options.output.string(), ": ", s.documents, " documents, ", s.tokens, " tokens (",
                          s.images, " images encoded); skipped ", s.skipped_images, " images that do not decode, ",
                          s.bad_rows, " rows that cannot be read and ", s.skipped_documents, " documents"));
  });
}

void add_shards(CLI::App& parent) {
  auto state = std::make_shared<ShardState>();
  auto& o = state->options;
  auto* command = parent.add_subcommand("shards", "Captioned images and text to pre-tokenised shards");
  command->add_option(
      "--manifest", o.manifests,
      "Captioned images, segments, messages or conversations: JSONL, CSV, ImageFolder directories, WebDataset tars "
      "(also x-{000..123}.tar and folders of them), Hugging Face Parquet and Arrow files and their folders");
  command->add_option("--image-column", o.columns.image,
                      "Column or key that holds the picture, where it is not called image");
  command->add_option("--text-column", o.columns.text,
                      "Column or key that holds its text (or a list of captions), where it is not called text");
  command->add_flag("--strict", o.strict,
                    "End at the first row or picture that cannot be read, instead of skipping it");
  command->add_option("--text", o.texts, "Text files, one document a line");
  command->add_option("--codec", o.codec, "Folder of the image codec");
  command->add_option("--modality", o.modality, "Name of the images' modality in the run")->capture_default_str();
  command
      ->add_option("--codec-of", state->codecs,
                   "NAME=DIR: codec of images whose segment says \"modality\": NAME, where a set holds several "
                   "modalities (repeatable)")
      ->allow_extra_args(false);
  command->add_option("--captions", o.captions, "text: the main caption of a picture; all: a document for each")
      ->capture_default_str();
  command->add_option("--prefix", o.prefix, "Text before each caption");
  command->add_option("--suffix", o.suffix, "Text behind each caption");
  command->add_option("--batch-size", o.batch_size, "Images encoded at a time")->capture_default_str();
  add_shard_options(*command, state);
  command->footer(
      "Example:\n  moegraft data prepare shards --manifest data/emoji/popular.jsonl --tokenizer models/base --codec "
      "models/codec -o data/shards/popular\n  moegraft data prepare shards --manifest 'cc3m-{000000..000331}.tar' "
      "--tokenizer models/base --codec models/codec -o data/shards/cc3m");
}

void add_text(CLI::App& parent) {
  auto state = std::make_shared<ShardState>();
  auto* command = parent.add_subcommand("text", "Plain text to pre-tokenised shards");
  command->add_option("files,--text", state->options.texts, "Text files, one document a line")->required();
  add_shard_options(*command, state);
  command->footer(
      "Example:\n  moegraft data prepare text data/corpus/train.txt --tokenizer models/tokenizer -o data/shards/text");
}

// A document as it reads, with "<image: 36 codes>" in a picture's place.
std::string shown(const data::ShardSet& shards, const tokenizer::Tokenizer& tokenizer, int64_t index) {
  std::string text;
  for (const auto& segment : shards.document(index)) {
    if (segment.modality == 0)
      text += tokenizer.decode({segment.ids.begin(), segment.ids.end()});
    else
      text += detail::concat("<", shards.schema().modalities[static_cast<size_t>(segment.modality)].name, ": ",
                             segment.ids.size(), " codes>");
  }
  return printable(text);
}

void add_check(CLI::App& parent) {
  struct State {
    std::string path, tokenizer;
    int64_t show = 0;
    bool json = false;
  };
  auto state = std::make_shared<State>();
  auto* command =
      parent.add_subcommand("check", "Read every document of a shard or a folder of shards, and say what it holds");
  command->add_option("path", state->path, "Shard or folder")->required();
  command->add_option("--show", state->show, "Print the first so many documents as they read")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--tokenizer", state->tokenizer,
                      "With --show: folder of the tokenizer (or of the model) that made the shards");
  command->add_flag("--json", state->json, "Print the summary as one JSON object");
  command->footer(
      "Examples:\n  moegraft data check data/shards/popular\n  moegraft data check data/shards/popular --show 5 "
      "--tokenizer models/base");
  command->callback([state] {
    MOEGRAFT_CHECK_USAGE(state->show == 0 || !state->tokenizer.empty(),
                         "--show needs --tokenizer DIR, the tokenizer that made the shards");
    const auto tokenizer = state->show > 0 ? tokenizer::load_tokenizer(state->tokenizer) : nullptr;
    const data::ShardSet shards(state->path);
    shards.validate();
    if (tokenizer)
      if (const auto made = shards.fingerprints().find("tokenizer"); made != shards.fingerprints().end())
        MOEGRAFT_CHECK_USAGE(made->second == data::tokenizer_fingerprint(*tokenizer), state->path,
                             " was made with another tokenizer than ", state->tokenizer, ": name the one that made it");
    for (int64_t i = 0; i < std::min(state->show, shards.num_documents()); ++i)
      std::cout << i << "\t" << shown(shards, *tokenizer, i) << "\n";
    Json modalities = Json::array();
    std::string names;
    for (const auto& m : shards.schema().modalities) {
      modalities.push_back({{"name", m.name},
                            {"ids", m.num_codes},
                            {"item_length", m.item_length},
                            {"codebooks", m.codebooks},
                            {"positions", m.positions}});
      names += detail::concat(names.empty() ? "" : ", ", m.name, " (", m.num_codes, " ids",
                              m.codebooks > 1 ? detail::concat(" in ", m.codebooks, " codebooks") : "",
                              m.item_length ? detail::concat(", ", m.item_length, " an item") : "", ")");
    }
    Json skipped = Json::object();
    std::string lost;
    for (const auto& [what, count] : shards.counts()) {
      skipped[what] = count;
      if (count > 0) lost += detail::concat(lost.empty() ? "; skipped when made: " : ", ", what, " ", count);
    }
    report({{"documents", shards.num_documents()},
            {"tokens", shards.num_tokens()},
            {"modalities", modalities},
            {"skipped", skipped}},
           state->json,
           detail::concat(state->path, ": ", shards.num_documents(), " documents, ", shards.num_tokens(), " tokens; ",
                          names, lost));
  });
}

}  // namespace

void add_data_command(CLI::App& app) {
  auto* data = app.add_subcommand("data", "Prepare and check training data");
  data->require_subcommand(1);
  auto* prepare = data->add_subcommand("prepare", "Turn sources into manifests, text files and pre-tokenised shards");
  prepare->require_subcommand(1);
  add_emoji(*prepare);
  add_corpus(*prepare);
  add_text(*prepare);
  add_shards(*prepare);
  add_check(*data);
  add_deal(*data);
}

}  // namespace moegraft::tools
