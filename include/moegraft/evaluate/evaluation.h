#pragma once
// All measures of one model, as `moegraft eval` prints them.

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/codec/train.h"
#include "moegraft/evaluate/captions.h"
#include "moegraft/evaluate/config.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/evaluate/retrieval.h"
#include "moegraft/routing/stats.h"

namespace moegraft::evaluate {

struct TextResult {
  int64_t tokens = 0;                  // predicted
  double nll = 0;
  std::optional<double> base_nll;      // of the base below a graft
  bool equal_bits() const { return base_nll && *base_nll == nll; }
};
struct ImageResult {
  CaptionUse use;
  std::optional<double> unigram;
};

struct Evaluation {
  std::string model, dtype, device;
  int64_t step = 0;
  std::optional<TextResult> text;
  std::map<std::string, Drift> drift;  // by dtype
  std::map<std::string, ImageResult> images;
  std::map<std::string, codec::Quality> codec;
  std::map<std::string, Retrieval> retrieval;
  std::map<std::string, std::string> sheets;                   // by retrieval
  std::optional<routing::RoutingReport> routing, routing_start;

  std::string to_json() const;   // one object, one line; keys in README.md
  std::string to_table() const;  // aligned, for people
};

// Reconstruction and code use on section's pictures, evenly spread. UserError: no codec, no picture that decodes.
codec::Quality measure_codec(const graft::GraftedModel& model, const model::ModalityTokens& tokens, const CodecSection& section);

// Opens the model and measures what config asks for. An empty config on a run means its data.eval and the drift. UsageError: a measure of pictures on a
// plain text model; nothing to measure.
Evaluation evaluate_model(const std::filesystem::path& path, EvalConfig config);

}  // namespace moegraft::evaluate
