#pragma once
// All measures of one model, as `moegraft eval` prints them.

#include <filesystem>
#include <functional>
#include <string>

#include "moegraft/codec/train.h"
#include "moegraft/evaluate/config.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

// Reconstruction and code use on section's pictures, evenly spread. UserError: no codec, no picture that decodes.
codec::Quality measure_codec(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                             const CodecSection& section);

struct EvaluationOptions {
  std::filesystem::path output;  // the JSON, written (atomically) after every section; empty: nowhere
  std::function<void(const std::string& rows)> on_rows;  // lines of the table, section by section as they are done
};

// Opens the model and measures what config asks for. Returns one JSON object on one line; keys in README.md. An empty
// config on a run means its data.eval and the drift. What `output` holds already of the same parameters, section
// settings and data (shards and manifests by content) is kept and not measured again. UsageError: a measure of pictures
// on a plain text model; nothing to measure; an output that is a folder.
std::string evaluate_model(const std::filesystem::path& path, EvalConfig config, const EvaluationOptions& options = {});

}  // namespace moegraft::evaluate
