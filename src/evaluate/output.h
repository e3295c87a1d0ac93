#pragma once
// Results as JSON (keys in README.md), and that JSON as rows of the table.

#include <optional>
#include <string>

#include "moegraft/codec/train.h"
#include "moegraft/evaluate/baselines.h"
#include "moegraft/evaluate/captions.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/evaluate/likelihood_ranking.h"
#include "moegraft/evaluate/retrieval.h"
#include "moegraft/io/json.h"
#include "moegraft/routing/stats.h"

namespace moegraft::evaluate {

struct TextResult {
  int64_t tokens = 0;  // predicted
  std::string packing;
  int64_t sequence_length = 0;
  double nll = 0;
  std::optional<double> base_nll;  // of the base below a graft
};
struct ImageResult {
  CaptionUse use;
  std::optional<double> unigram;
};

io::Json to_json(const TextResult& result);
io::Json to_json(const ImageResult& result);
io::Json to_json(const codec::Quality& quality);
io::Json to_json(const Retrieval& retrieval);
io::Json to_json(const Baselines& baselines);
io::Json to_json(const LikelihoodRanking& ranking);
io::Json to_json(const Drift& drift);
io::Json to_json(const routing::RoutingReport& report);

// "measure value remark" lines; columns are wide enough for most, so that rows printed one by one line up.
std::string table_row(const std::string& measure, const std::string& value, const std::string& remark = {});
// Of one section's result; `key` is its place in the JSON ("retrieval"), `name` its own ("compositions").
std::string table_rows(const std::string& key, const std::string& name, const io::Json& result);

}  // namespace moegraft::evaluate
