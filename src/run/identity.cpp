#include "moegraft/run/identity.h"

#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/shard.h"
#include "moegraft/run/records.h"
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
  for (const auto& [list, sources] :
       {std::pair("data.train", &config.data.train), std::pair("data.eval", &config.data.eval)})
    for (size_t i = 0; i < sources->size(); ++i)
      paths[std::string(list) + "[" + std::to_string(i) + "]"] = (*sources)[i].path;
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
    if (name == "base")
      out[name] = data::base_fingerprint(path);
    else if (name == "tokenizer")
      out[name] = data::tokenizer_fingerprint(*tokenizer::load_tokenizer(path));
    else if (is_data(name) && parts == Parts::all)
      out[name] = data::source_fingerprint(path);
    else if (!is_data(name) && parts != Parts::model)
      out[name] = data::codec_fingerprint(path);
  }
  return out;
}

void check_fingerprints(const Fingerprints& was, const Fingerprints& now, const RunConfig& config,
                        const std::string& whose, bool accept_data) {
  const auto paths = paths_of(config);
  std::vector<std::string> lines;
  for (const auto& [name, before] : was) {
    const auto after = now.find(name);
    if (after == now.end() || after->second == before) continue;
    const auto path = paths.find(name);
    const std::string what = detail::concat(name, " ", path == paths.end() ? "" : path->second, " is not the one that ",
                                            whose, " (fingerprint ", before, ", now ", after->second, ")");
    if (is_data(name) && accept_data)
      log::warning(what, ": accepted");
    else
      lines.push_back(what + ": " + remedy(name));
  }
  MOEGRAFT_CHECK(lines.empty(), join(lines, "; "));
}

void check_identity(const std::filesystem::path& dir, const Fingerprints& now, const RunConfig& config,
                    bool accept_data) {
  const auto was = recorded_fingerprints(dir);
  if (was.empty())
    log::warning(dir.string(),
                 " was made before fingerprints of base, codec, tokenizer and data were noted: whether they are the "
                 "same is not checked");
  check_fingerprints(was, now, config, "the run " + dir.string() + " was trained on", accept_data);
}

void check_shards(const std::vector<std::string>& sources, const Fingerprints& now, const RunConfig& config) {
  for (const auto& path : std::set<std::string>(sources.begin(), sources.end())) {
    const data::ShardSet shards(path);
    for (const auto& modality : shards.schema().modalities) {
      std::vector<std::string> known;
      for (const auto& [name, section] : config.modalities) known.push_back(name);
      MOEGRAFT_CHECK_USAGE(modality.name == "text" || config.modalities.contains(modality.name), "data source ", path,
                           " holds the modality \"", modality.name, "\", which `modalities` lacks (",
                           known.empty() ? "none" : join(known, ", "), "): add modalities.", modality.name,
                           " with the codec that made it, or leave the source out");
    }
    if (shards.fingerprints().empty())
      log::warning("data source ", path,
                   " does not say which tokenizer and codec made it: whether they are this run's is not checked; "
                   "moegraft data prepare notes them");
    for (const auto& [name, made_with] : shards.fingerprints()) {
      const auto own = now.find(name);
      MOEGRAFT_CHECK(own == now.end() || own->second == made_with, "data source ", path, " was made with another ",
                     name.starts_with("codec.") ? "codec" : name, " than this run's ", paths_of(config).at(name),
                     " (fingerprint ", made_with, ", the run's ", own->second,
                     "): prepare it again with this run's, or name the one that it was made with");
    }
  }
}

std::string content_of(const std::string& key) {
  if (key == "model.path") return "base";
  if (key == "model.init.tokenizer") return "tokenizer";
  const auto between = [&](const std::string& before, const std::string& after) {
    const bool fits = key.size() > before.size() + after.size() && key.starts_with(before) && key.ends_with(after);
    return fits ? key.substr(before.size(), key.size() - before.size() - after.size()) : std::string();
  };
  if (const auto name = between("modalities.", ".codec"); !name.empty()) return "codec." + name;
  const auto source = between("data.", ".path");
  return source.empty() ? "" : "data." + source;
}

Fingerprints recorded_fingerprints(const std::filesystem::path& dir) {
  return read_run_record(dir).fingerprints.value_or(Fingerprints{});
}

}  // namespace moegraft::run
