#include "output.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "moegraft/base/check.h"

namespace moegraft::evaluate {
namespace {

using io::Json;

constexpr size_t kMeasureWidth = 36, kValueWidth = 10;

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }  // JSON has no NaN
double number(const Json& value) { return value.is_number() ? value.get<double>() : NAN; }

Json to_json(const Ranking& r) { return {{"top1", r.top(1)}, {"top10", r.top(10)}, {"mean_rank", r.mean_rank()}}; }

Json chance(int64_t candidates) {
  return {{"top1", chance_of_top(1, candidates)}, {"top10", chance_of_top(10, candidates)}};
}

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}
std::string format(const char* pattern, const Json& value) { return format(pattern, number(value)); }
std::string percent(const Json& share) { return format("%.1f %%", 100 * number(share)); }

std::string text_rows(const std::string&, const Json& r) {
  std::string packing = r.at("packing");
  if (packing == "stream") packing += " of " + r.at("sequence_length").dump();
  std::string out =
      table_row("text perplexity", format("%.4f", r.at("perplexity")), r.at("tokens").dump() + " tokens, " + packing);
  if (r.contains("base_perplexity"))
    out += table_row("  of the base", format("%.4f", r["base_perplexity"]),
                     r.at("equal_bits").get<bool>() ? "equal to the last bit" : "NOT EQUAL");
  return out;
}

std::string image_rows(const std::string& name, const Json& r) {
  std::string out = table_row("picture NLL, " + name, format("%.4f", r.at("nll")),
                              "nats per token, " + r.at("items").dump() + " pictures");
  out += table_row("  caption dropped", format("%.4f", r.at("nll_empty")));
  out += table_row("  captions shuffled", format("%.4f", r.at("nll_shuffled")),
                   "prompt used: " + format("%.4f", r.at("prompt_used")) + " nats");
  if (r.contains("unigram")) out += table_row("  unigram baseline", format("%.4f", r["unigram"]));
  return out;
}

std::string codec_rows(const std::string& name, const Json& r) {
  return table_row("codec PSNR, " + name, format("%.2f dB", r.at("psnr")),
                   r.at("pictures").dump() + " pictures, " + r.at("used_codes").dump() + " codes used, perplexity " +
                       format("%.1f", r.at("perplexity")));
}

std::string retrieval_rows(const std::string& name, const Json& r) {
  return table_row("retrieval top-1, " + name, percent(r.at("top1")),
                   r.at("n").dump() + " prompts among " + r.at("candidates").dump() + " pictures; reconstructions " +
                       percent(r.at("reconstructed").at("top1")) + "; chance " + percent(r.at("chance").at("top1"))) +
         table_row("  top-10", percent(r.at("top10")),
                   "mean rank " + format("%.1f", r.at("mean_rank")) +
                       (r.contains("sheet") ? "; " + r["sheet"].get<std::string>() : ""));
}

// "bag of words top-1, compositions".
std::string baseline_rows(const std::string&, const Json& r) {
  std::string out;
  for (const auto& [key, title] : {std::pair("bag_of_words", "bag of words"), std::pair("base_states", "base states")})
    for (const auto& [name, task] : r.at("tasks").items())
      if (task.contains(key))
        out += table_row(std::string(title) + " top-1, " + name, percent(task[key].at("top1")),
                         "top-10 " + percent(task[key].at("top10")) + "; chance " +
                             percent(task.at("chance").at("top1")) + ", " + percent(task["chance"].at("top10")));
  return out;
}

std::string ranking_rows(const std::string& name, const Json& r) {
  std::string out;
  for (const auto& [key, title] :
       {std::pair("image_to_caption", "likeliest caption, "), std::pair("caption_to_image", "likeliest picture, "),
        std::pair("caption_to_image_pmi", "  against no caption, ")})
    if (r.contains(key))
      out +=
          table_row(title + name, percent(r[key].at("top1")),
                    "top-10 " + percent(r[key].at("top10")) + ", mean rank " + format("%.1f", r[key].at("mean_rank")) +
                        "; " + r.at("n").dump() + " among " + r.at("candidates").dump() + ", chance " +
                        percent(r.at("chance").at("top1")) + ", " + percent(r["chance"].at("top10")));
  return out;
}

std::string drift_rows(const std::string& dtype, const Json& r) {
  return table_row("text drift, " + dtype, format("%.3g", r.at("max_abs")),
                   std::string(r.at("exact").get<bool>() ? "every bit equal" : "NOT EXACT") + "; with the gate open " +
                       format("%.3g", r.at("gate_open")));
}

std::string routing_rows(const std::string&, const Json& r) {
  std::string out;
  for (const char* when : {"start", "now"})
    if (r.contains(when))
      for (const auto& [modality, bits] : r[when].at("divergence_bits").items())
        out += table_row("routing divergence, " + std::string(when), format("%.4f", bits),
                         "bits between text and " + modality);
  return out;
}

}  // namespace

Json to_json(const TextResult& r) {
  Json j{{"tokens", r.tokens},
         {"packing", r.packing},
         {"sequence_length", r.sequence_length},
         {"nll", number(r.nll)},
         {"perplexity", number(std::exp(r.nll))}};
  if (!r.base_nll) return j;
  j["base_nll"] = number(*r.base_nll);
  j["base_perplexity"] = number(std::exp(*r.base_nll));
  j["equal_bits"] = *r.base_nll == r.nll;
  return j;
}

Json to_json(const ImageResult& r) {
  Json j{{"items", r.use.items},
         {"labels", r.use.labels},
         {"nll", number(r.use.nll_true)},
         {"nll_empty", number(r.use.nll_empty)},
         {"nll_shuffled", number(r.use.nll_shuffled)},
         {"prompt_used", number(r.use.prompt_used())}};
  if (r.unigram) j["unigram"] = number(*r.unigram);
  return j;
}

Json to_json(const codec::Quality& q) {
  return {{"pictures", q.pictures}, {"psnr", number(q.psnr)},     {"psnr_pooled", number(q.psnr_pooled)},
          {"l1", number(q.l1)},     {"used_codes", q.used_codes}, {"perplexity", number(q.perplexity)}};
}

Json to_json(const Retrieval& r) {
  Json j = to_json(r.real);
  j["n"] = r.items.size();
  j["candidates"] = r.candidates;
  j["skipped_pictures"] = r.skipped;
  j["chance"] = chance(r.candidates);
  j["seconds"] = r.seconds;
  j["reconstructed"] = to_json(r.reconstructed);
  j["items"] = Json::array();
  for (const auto& item : r.items)
    j["items"].push_back(
        {{"caption", item.caption}, {"image", item.image}, {"rank", item.rank}, {"nearest", item.nearest}});
  return j;
}

Json to_json(const Baselines& b) {
  const auto fit = [](const ProbeFit& p) {
    return Json{{"features", p.features}, {"lambda", p.lambda}, {"held_out_mse", number(p.held_out_error)}};
  };
  Json j{{"pictures", b.pictures},
         {"captions", b.captions},
         {"seconds", b.seconds},
         {"fit", {{"bag_of_words", fit(b.bag_of_words)}}}};
  if (b.base_states) j["fit"]["base_states"] = fit(*b.base_states);
  for (const auto& [name, candidates] : b.candidates) {
    Json& task = j["tasks"][name];
    const Ranking& words = b.bag_of_words.rankings.at(name);
    task = {{"n", words.rank_N.size()},
            {"candidates", candidates},
            {"chance", chance(candidates)},
            {"bag_of_words", to_json(words)}};
    if (b.base_states) task["base_states"] = to_json(b.base_states->rankings.at(name));
  }
  return j;
}

Json to_json(const LikelihoodRanking& r) {
  Json j{{"n", r.candidates_N.size()},
         {"candidates", *std::max_element(r.candidates_N.begin(), r.candidates_N.end())},
         {"chance", {{"top1", r.chance(1)}, {"top10", r.chance(10)}}},
         {"seconds", r.seconds}};
  if (r.captions) j["image_to_caption"] = to_json(*r.captions);
  if (r.pictures) j["caption_to_image"] = to_json(*r.pictures);
  if (r.pictures_pmi) j["caption_to_image_pmi"] = to_json(*r.pictures_pmi);
  return j;
}

Json to_json(const Drift& drift) {
  Json cases = Json::object();
  for (const auto& c : drift.cases) cases[c.name] = {{"max_abs", number(c.max_abs)}, {"equal_bits", c.equal_bits}};
  return {{"max_abs", number(drift.max_abs())},
          {"exact", drift.exact()},
          {"gate_open", number(drift.gate_open)},
          {"cases", cases}};
}

Json to_json(const routing::RoutingReport& r) {
  Json divergence = Json::object(), entropy = Json::object();
  for (size_t m = 0; m < r.modality_names.size(); ++m) {
    entropy[r.modality_names[m]] = number(r.mean_entropy(m));
    if (m > 0) divergence[r.modality_names[m]] = number(r.mean_divergence(m));
  }
  return {{"divergence_bits", divergence}, {"entropy", entropy}};
}

// Widths in bytes; values are ASCII.
std::string table_row(const std::string& measure, const std::string& value, const std::string& remark) {
  const auto pad = [](size_t width, const std::string& cell) {
    return std::string(width - std::min(width, cell.size()), ' ');
  };
  return measure + pad(kMeasureWidth, measure) + " " + pad(kValueWidth, value) + value +
         (remark.empty() ? "\n" : "  " + remark + "\n");
}

std::string table_rows(const std::string& key, const std::string& name, const Json& result) {
  static const std::map<std::string, std::string (*)(const std::string&, const Json&)> sections{
      {"text", text_rows},          {"images", image_rows},    {"codec", codec_rows}, {"retrieval", retrieval_rows},
      {"baselines", baseline_rows}, {"ranking", ranking_rows}, {"drift", drift_rows}, {"routing", routing_rows}};
  const auto found = sections.find(key);
  MOEGRAFT_INVARIANT(found != sections.end(), "no rows for ", key);
  return found->second(name, result);
}

}  // namespace moegraft::evaluate
