#include <cmath>
#include <cstdio>

#include "moegraft/evaluate/evaluation.h"
#include "moegraft/io/json.h"

namespace moegraft::evaluate {
namespace {

using Json = io::Json;

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }  // JSON has no NaN

Json to_json(const Drift& drift) {
  Json cases = Json::object();
  for (const auto& c : drift.cases) cases[c.name] = {{"max_abs", number(c.max_abs)}, {"equal_bits", c.equal_bits}};
  return {{"max_abs", number(drift.max_abs())}, {"exact", drift.exact()}, {"gate_open", number(drift.gate_open)}, {"cases", cases}};
}

Json to_json(const Ranking& r) { return {{"top1", r.top(1)}, {"top10", r.top(10)}, {"mean_rank", r.mean_rank()}}; }

Json to_json(const Retrieval& r) {
  Json j = to_json(r.real);
  j["n"] = r.items.size();
  j["candidates"] = r.candidates;
  j["skipped_pictures"] = r.skipped;
  j["seconds"] = r.seconds;
  j["reconstructed"] = to_json(r.reconstructed);
  j["items"] = Json::array();
  for (const auto& item : r.items) j["items"].push_back({{"caption", item.caption}, {"image", item.image}, {"rank", item.rank}, {"nearest", item.nearest}});
  return j;
}

Json to_json(const routing::RoutingReport& r) {
  Json divergence = Json::object(), entropy = Json::object();
  for (size_t m = 0; m < r.modality_names.size(); ++m) {
    entropy[r.modality_names[m]] = number(r.mean_entropy(m));
    if (m > 0) divergence[r.modality_names[m]] = number(r.mean_divergence(m));
  }
  return {{"divergence_bits", divergence}, {"entropy", entropy}};
}

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}
std::string percent(double share) { return format("%.1f %%", 100 * share); }

// measure | value | remark, columns as wide as their widest cell (in bytes; values are ASCII).
class Table {
 public:
  void add(std::string measure, std::string value, std::string remark = {}) { rows_.push_back({std::move(measure), std::move(value), std::move(remark)}); }
  std::string print() const {
    size_t first = 0, second = 0;
    for (const auto& r : rows_) first = std::max(first, r.measure.size()), second = std::max(second, r.value.size());
    std::string out;
    for (const auto& r : rows_) {
      out += r.measure + std::string(first - r.measure.size() + 2, ' ') + std::string(second - r.value.size(), ' ') + r.value;
      out += r.remark.empty() ? "\n" : "  " + r.remark + "\n";
    }
    return out;
  }

 private:
  struct Row {
    std::string measure, value, remark;
  };
  std::vector<Row> rows_;
};

}  // namespace

std::string Evaluation::to_json() const {
  Json j{{"model", model}, {"dtype", dtype}, {"device", device}, {"step", step}};
  if (text) {
    j["text"] = {{"tokens", text->tokens}, {"nll", number(text->nll)}, {"perplexity", number(std::exp(text->nll))}};
    if (text->base_nll) {
      j["text"]["base_nll"] = number(*text->base_nll);
      j["text"]["base_perplexity"] = number(std::exp(*text->base_nll));
      j["text"]["equal_bits"] = text->equal_bits();
    }
  }
  for (const auto& [name, d] : drift) j["drift"][name] = evaluate::to_json(d);
  for (const auto& [name, r] : images) {
    j["images"][name] = {{"items", r.use.items}, {"labels", r.use.labels}, {"nll", number(r.use.nll_true)}, {"nll_empty", number(r.use.nll_empty)},
                         {"nll_shuffled", number(r.use.nll_shuffled)}, {"prompt_used", number(r.use.prompt_used())}};
    if (r.unigram) j["images"][name]["unigram"] = number(*r.unigram);
  }
  for (const auto& [name, q] : codec)
    j["codec"][name] = {{"pictures", q.pictures}, {"psnr", number(q.psnr)}, {"psnr_pooled", number(q.psnr_pooled)}, {"l1", number(q.l1)}, {"used_codes", q.used_codes},
                        {"perplexity", number(q.perplexity)}};
  for (const auto& [name, r] : retrieval) {
    j["retrieval"][name] = evaluate::to_json(r);
    if (sheets.contains(name)) j["retrieval"][name]["sheet"] = sheets.at(name);
  }
  if (routing) j["routing"]["now"] = evaluate::to_json(*routing);
  if (routing_start) j["routing"]["start"] = evaluate::to_json(*routing_start);
  return j.dump();
}

std::string Evaluation::to_table() const {
  Table t;
  t.add(model, "step " + std::to_string(step), dtype + " on " + device);
  if (text) {
    t.add("text perplexity", format("%.4f", std::exp(text->nll)), std::to_string(text->tokens) + " tokens");
    if (text->base_nll) t.add("  of the base", format("%.4f", std::exp(*text->base_nll)), text->equal_bits() ? "equal to the last bit" : "NOT EQUAL");
  }
  for (const auto& [name, d] : drift)
    t.add("text drift, " + name, format("%.3g", d.max_abs()), std::string(d.exact() ? "every bit equal" : "NOT EXACT") + "; with the gate open " + format("%.3g", d.gate_open));
  for (const auto& [name, r] : images) {
    t.add("picture NLL, " + name, format("%.4f", r.use.nll_true), "nats per token, " + std::to_string(r.use.items) + " pictures");
    t.add("  caption dropped", format("%.4f", r.use.nll_empty));
    t.add("  captions shuffled", format("%.4f", r.use.nll_shuffled), "prompt used: " + format("%.4f", r.use.prompt_used()) + " nats");
    if (r.unigram) t.add("  unigram baseline", format("%.4f", *r.unigram));
  }
  for (const auto& [name, q] : codec)
    t.add("codec PSNR, " + name, format("%.2f dB", q.psnr), std::to_string(q.pictures) + " pictures, " + std::to_string(q.used_codes) + " codes used, perplexity " + format("%.1f", q.perplexity));
  for (const auto& [name, r] : retrieval) {
    t.add("retrieval top-1, " + name, percent(r.real.top(1)), std::to_string(r.items.size()) + " prompts among " + std::to_string(r.candidates) + " pictures; reconstructions " + percent(r.reconstructed.top(1)));
    t.add("  top-10", percent(r.real.top(10)), "mean rank " + format("%.1f", r.real.mean_rank()) + (sheets.contains(name) ? "; " + sheets.at(name) : ""));
  }
  for (const auto& [when, report] : {std::pair("start", &routing_start), std::pair("now", &routing)})
    if (*report)
      for (size_t m = 1; m < (*report)->modality_names.size(); ++m)
        t.add("routing divergence, " + std::string(when), format("%.4f", (*report)->mean_divergence(m)), "bits between text and " + (*report)->modality_names[m]);
  return t.print();
}

}  // namespace moegraft::evaluate
