#pragma once
// What a run was made from, by content: compared on resume, when it is opened, for init_from and between processes, so
// that a run never goes on with another base, codec, tokenizer or data set than it knows without a word.

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moegraft/run/run_config.h"

namespace moegraft::run {

// "base", "tokenizer", "codec.image", "data.train[0]", "data.eval[0]" -> 16 hex digits (io/fingerprint.h,
// data/fingerprints.h).
using Fingerprints = std::map<std::string, std::string>;

enum class Parts { model, model_and_codecs, all };  // all: with the data
Fingerprints take_fingerprints(const RunConfig& config, Parts parts);

// Compares what both sides name. UserError names each thing that differs, with its path and what to do; data that
// differs is let pass, with a warning, where `accept_data`. whose: "the run runs/a was trained on".
void check_fingerprints(const Fingerprints& was, const Fingerprints& now, const RunConfig& config,
                        const std::string& whose, bool accept_data = false);

// The same against what a run's run.json records; a warning where it records nothing, as runs did once.
void check_identity(const std::filesystem::path& dir, const Fingerprints& now, const RunConfig& config,
                    bool accept_data = false);

// That data sets hold modalities of the config alone and were made with this run's tokenizer and codecs; a warning
// where they do not say what made them. UserError names the source; UsageError a modality that `modalities` lacks.
void check_shards(const std::vector<std::string>& sources, const Fingerprints& now, const RunConfig& config);

// What the value of a config key is compared by instead of its letters: "base" of model.path, "data.train[0]" of
// data.train[0].path. Empty for any other key.
std::string content_of(const std::string& key);

// Of an existing run, from its run.json; empty for one made before they were noted.
Fingerprints recorded_fingerprints(const std::filesystem::path& dir);

}  // namespace moegraft::run
