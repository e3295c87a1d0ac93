// moegraft summary: what a quickstart left behind, as one table and summary.json.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <vector>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/io/json.h"
#include "moegraft/run/records.h"

namespace moegraft::tools {
namespace {

using io::Json;
namespace fs = std::filesystem;

std::vector<std::pair<std::string, int64_t>> read_stages(const fs::path& file) {
  std::vector<std::pair<std::string, int64_t>> stages;
  std::ifstream in(file);
  MOEGRAFT_CHECK(in.good(), file.string(), " is missing: run tools/quickstart.sh first");
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    std::string name;
    int64_t seconds = 0;
    MOEGRAFT_CHECK(std::getline(fields, name, '\t') && (fields >> seconds), file.string(),
                   ": expected NAME<tab>SECONDS, got '", line, "'");
    stages.emplace_back(name, seconds);
  }
  return stages;
}

// Runs that differ in how they began, a folder each: the last losses of the new modalities, in training and held out,
// as "random_nll_image" and "random_eval_nll_image".
Json compare_runs(const fs::path& folder) {
  Json losses = Json::object();
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto metrics = run::read_metrics(entry.path() / "metrics.jsonl");
    const auto add = [&](const auto& lines, const std::string& prefix) {
      if (lines.empty()) return;
      for (const auto& [modality, nll] : lines.back().nll)
        if (modality != "text") losses[entry.path().filename().string() + prefix + modality] = nll;
    };
    add(metrics.training, "_nll_");
    add(metrics.evaluations, "_eval_nll_");
  }
  return losses;
}

// Leaves of a JSON object as "a.b  value" rows.
void flatten(const Json& j, const std::string& prefix, std::vector<std::pair<std::string, std::string>>& rows) {
  if (j.is_object()) {
    for (const auto& [key, value] : j.items()) flatten(value, prefix.empty() ? key : prefix + "." + key, rows);
  } else if (j.is_number_float()) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.4g", j.get<double>());
    rows.emplace_back(prefix, buffer);
  } else if (!j.is_array()) {
    rows.emplace_back(prefix, j.is_string() ? j.get<std::string>() : j.dump());
  }
}

// Retrieval beside its baselines, and the likelihood rankings: "top-1 / top-10" in percent by kind of prompt.
void print_understanding(const Json& eval) {
  struct Column {
    const char* title;
    std::vector<std::string> before, after;  // the way to its numbers, around the name of the prompts
  };
  static const std::vector<Column> columns{{"retrieval", {"retrieval"}, {}},
                                           {"bag of words", {"baselines", "tasks"}, {"bag_of_words"}},
                                           {"base states", {"baselines", "tasks"}, {"base_states"}},
                                           {"chance", {"retrieval"}, {"chance"}},
                                           {"caption by NLL", {"ranking"}, {"image_to_caption"}},
                                           {"picture by NLL", {"ranking"}, {"caption_to_image"}},
                                           {"picture by PMI", {"ranking"}, {"caption_to_image_pmi"}},
                                           {"chance of these", {"ranking"}, {"chance"}}};
  std::set<std::string> names;
  for (const char* key : {"retrieval", "ranking"})
    if (eval.contains(key))
      for (const auto& [name, result] : eval[key].items()) names.insert(name);
  if (names.empty()) return;
  std::printf("\n%-24s", "top-1 / top-10, %");
  for (const auto& column : columns) std::printf(" %15s", column.title);
  std::printf("\n");
  for (const auto& name : names) {
    std::printf("%-24s", name.c_str());
    for (const auto& column : columns) {
      Json::json_pointer at;
      for (const auto& key : column.before) at /= key;
      at /= name;
      for (const auto& key : column.after) at /= key;
      char cell[32] = "-";
      if (eval.contains(at / "top1") && eval.contains(at / "top10"))
        std::snprintf(cell, sizeof cell, "%.1f / %.1f", 100 * eval.at(at / "top1").get<double>(),
                      100 * eval.at(at / "top10").get<double>());
      std::printf(" %15s", cell);
    }
    std::printf("\n");
  }
}

void run(const fs::path& dir) {
  Json summary{{"stages", Json::object()}};
  int64_t total = 0;
  std::printf("%-16s %8s\n", "stage", "seconds");
  for (const auto& [name, seconds] : read_stages(dir / "stages.tsv")) {
    std::printf("%-16s %8lld\n", name.c_str(), static_cast<long long>(seconds));
    summary["stages"][name] = seconds;
    total += seconds;
  }
  std::printf("%-16s %8lld\n\n", "total", static_cast<long long>(total));
  summary["seconds"] = total;
  for (const char* part : {"codec", "inspect", "eval", "export", "real_base"})
    if (fs::exists(dir / (std::string(part) + ".json")))
      summary[part] = io::read_json(dir / (std::string(part) + ".json"));
  if (fs::exists(dir / "inits")) summary["initialisations"] = compare_runs(dir / "inits");
  if (fs::exists(dir / "graft" / "init.json")) summary["init"] = io::read_json(dir / "graft" / "init.json");
  io::write_json(dir / "summary.json", summary);
  for (const char* part : {"codec", "inspect", "initialisations", "eval", "real_base"}) {
    if (!summary.contains(part)) continue;
    std::vector<std::pair<std::string, std::string>> rows;
    flatten(summary[part], part, rows);
    for (const auto& [key, value] : rows)
      if (!key.starts_with("eval.sections.")) std::printf("%-52s %s\n", key.c_str(), value.c_str());
  }
  if (summary.contains("eval")) print_understanding(summary["eval"]);
  std::printf("\nwritten: %s\n", (dir / "summary.json").c_str());
}

}  // namespace

void add_summary_command(CLI::App& app) {
  auto dir = std::make_shared<std::string>();
  CLI::App* cmd = app.add_subcommand("summary", "One table of what a quickstart measured");
  cmd->add_option("dir", *dir, "The quickstart's folder")->required();
  cmd->footer("Example: moegraft summary runs/quickstart");
  cmd->callback([dir] { run(*dir); });
}

}  // namespace moegraft::tools
