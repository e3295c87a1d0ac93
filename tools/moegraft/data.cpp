#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/log.h"
#include "moegraft/data/emoji.h"

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
    data::EmojiOptions options;
    bool json = false;
  };
  auto state = std::make_shared<State>();
  auto& o = state->options;
  auto* command = parent.add_subcommand("emoji", "Pictures of Noto Color Emoji with CLDR names and keywords");
  command->add_option("-o,--output", o.output, "Folder to write")->required();
  command->add_option("--size", o.size, "Pixels a side, on white")->capture_default_str();
  command->add_option("--limit", o.limit, "Only so many pictures, well-known ones first; 0: all")->capture_default_str();
  command->add_option("--popular", o.popular, "Pictures in popular.jsonl")->capture_default_str();
  command->add_option("--holdout", o.holdout, "Share of concepts held out")->capture_default_str();
  command->add_option("--seed", o.seed, "Seed of the splits")->capture_default_str();
  command->add_option("--font", o.font, "Colour-bitmap font")->capture_default_str();
  command->add_option("--annotations", o.annotations, "CLDR folder that holds annotations/ and annotationsDerived/")->capture_default_str();
  command->add_option("--language", o.language, "CLDR language")->capture_default_str();
  command->add_flag("--json", state->json, "Print the summary as one JSON object");
  command->footer("Example:\n  moegraft data prepare emoji -o data/emoji --size 36\n  -> data/emoji/{images/, train,heldout,compositions,popular}.jsonl");
  command->callback([state] {
    const auto s = data::prepare_emoji(state->options);
    report({{"pictures", s.pictures}, {"train", s.train}, {"heldout", s.heldout}, {"compositions", s.compositions}, {"popular", s.popular}, {"without_glyph", s.without_glyph}},
           state->json,
           detail::concat(s.pictures, " pictures in ", state->options.output.string(), ": ", s.train, " to train (", s.popular, " of them popular), ", s.heldout,
                          " held out, ", s.compositions, " held-out compositions; ", s.without_glyph, " annotated sequences have no picture"));
  });
}

}  // namespace

void add_data_command(CLI::App& app) {
  auto* data = app.add_subcommand("data", "Prepare and check training data");
  data->require_subcommand(1);
  auto* prepare = data->add_subcommand("prepare", "Turn sources into manifests, text files and pre-tokenised shards");
  prepare->require_subcommand(1);
  add_emoji(*prepare);
}

}  // namespace moegraft::tools
