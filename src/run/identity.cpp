#include "moegraft/run/identity.h"

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/shard.h"
#include "moegraft/io/json.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::run {
namespace {

bool is_data(const std::string& name) { return name.starts_with("data."); }

// Each thing's name and where the config says that it lies.
std::map<std::string, std::string> paths_of(const RunConfig& config) {
  std::map<std::string, std::string> paths;
  if (!config.model.init) paths["base"] = config.model.path;
  paths["tokenizer"] = config.model.init ? config.model.init->tokenizer : config.model.path;
  for (const auto& [name, modality] : config.modalities) paths["codec." + name] = modality.codec;
  for (const auto& [list, sources] : {std::pair("data.train", &config.data.train), std::pair("data.eval", &config.data.eval)})
    for (size_t i = 0; i < sources->size(); ++i) paths[std::string(list) + "[" + std::to_string(i) + "]"] = (*sources)[i].path;
  return paths;
}

std::string remedy(const std::string& name) {
  if (is_data(name)) return "put the old one back, or go on with the new one by --accept-changed data";
  return "put the old one back, or start a new run";
}

}  // namespace

Fingerprints take_fingerprints(const RunConfig& config, Parts parts) {
  Fingerprints out;
  for (const auto& [name, path] : paths_of(config)) {
    if (name == "base") out[name] = data::base_fingerprint(path);
    else if (name == "tokenizer") out[name] = data::tokenizer_fingerprint(*tokenizer::load_tokenizer(path));
    else if (is_data(name) && parts == Parts::all) out[name] = data::source_fingerprint(path);
    else if (!is_data(name) && parts != Parts::model) out[name] = data::codec_fingerprint(path);
  }
  return out;
}

void check_fingerprints(const Fingerprints& was, const Fingerprints& now, const RunConfig& config, const std::string& whose, bool accept_data) {
  const auto paths = paths_of(config);
  std::vector<std::string> lines;
  for (const auto& [name, before] : was) {
    const auto after = now.find(name);
    if (after == now.end() || after->second == before) continue;
    const auto path = paths.find(name);
    const std::string what = detail::concat(name, " ", path == paths.end() ? "" : path->second, " is not the one that ", whose, " (fingerprint ", before, ", now ", after->second, ")");
    if (is_data(name) && accept_data) log::warning(what, ": accepted");
    else lines.push_back(what + ": " + remedy(name));
  }
  MOEGRAFT_CHECK(lines.empty(), join(lines, "; "));
}

void check_shards(const RunConfig& config, const Fingerprints& now) {
  for (const auto* sources : {&config.data.train, &config.data.eval})
    for (const auto& source : *sources) {
      const data::ShardSet shards(source.path);
      for (const auto& [name, made_with] : shards.fingerprints()) {
        const auto own = now.find(name);
        MOEGRAFT_CHECK(own == now.end() || own->second == made_with, "data source ", source.path, " was made with another ", name.starts_with("codec.") ? "codec" : name, " than this run's ",
                       paths_of(config).at(name), " (fingerprint ", made_with, ", the run's ", own->second, "): prepare it again with this run's, or name the one that it was made with");
      }
    }
}

Fingerprints recorded_fingerprints(const std::filesystem::path& dir) {
  const auto j = io::read_json(dir / "run.json");
  if (!j.is_object() || !j.contains("fingerprints")) return {};
  const auto& recorded = j["fingerprints"];
  MOEGRAFT_CHECK(recorded.is_object(), (dir / "run.json").string(), ": \"fingerprints\" must be an object");
  Fingerprints out;
  for (const auto& [name, value] : recorded.items()) {
    MOEGRAFT_CHECK(value.is_string(), (dir / "run.json").string(), ": fingerprints.", name, " must be a string");
    out[name] = value.get<std::string>();
  }
  return out;
}

}  // namespace moegraft::run
