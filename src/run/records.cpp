#include "moegraft/run/records.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>

#include "fields.h"
#include "moegraft/routing/stats.h"

namespace moegraft::run {
namespace {

namespace fs = std::filesystem;

std::string read_from(const fs::path& path, int64_t offset) {
  if (!fs::exists(path)) return {};
  std::ifstream in(path, std::ios::binary);
  MOEGRAFT_CHECK(in.good(), "cannot open ", path.string(), ": ", std::strerror(errno));
  in.seekg(offset);
  std::ostringstream text;
  text << in.rdbuf();
  return std::move(text).str();
}

// each(line, "file:number") for every whole line of text from `begin` on; number: of the first.
template <class F>
void for_each_line(const fs::path& path, std::string_view text, size_t begin, int64_t number, F&& each) {
  for (size_t end; (end = text.find('\n', begin)) != std::string_view::npos; begin = end + 1, ++number)
    each(std::string(text.substr(begin, end + 1 - begin)), path.string() + ":" + std::to_string(number));
}

io::Json parse_object(const std::string& line, const std::string& where) {
  MOEGRAFT_CHECK(json_depth(line) <= kMostJsonDepth, where, ": brackets nest ", json_depth(line), " deep, expected ",
                 kMostJsonDepth, " at most");
  try {
    auto j = io::Json::parse(line);
    MOEGRAFT_CHECK(j.is_object(), where, ": expected a JSON object, got ", j.type_name());
    return j;
  } catch (const io::Json::exception& e) {
    std::string what =
        e.what();  // "[json.exception...] parse error at line 1, column C: <what>": the line's number is in `where`
    if (const size_t cut = what.find(": "); cut != std::string::npos) what = what.substr(cut + 2);
    fail<UserError>(where, ": not valid JSON: ", shortened(what, 160));
  }
}

void add(const std::string& line, const std::string& where, Metrics& metrics) {
  const auto j = parse_object(line, where);
  if (j.contains("loss"))
    metrics.training.push_back(fields::from_value<TrainingLine>(j, where));
  else if (j.contains("eval") && j["eval"] == true)
    metrics.evaluations.push_back(fields::from_value<EvaluationLine>(j, where));
}

}  // namespace

std::string to_json_line(const TrainingLine& line) { return fields::to_value(line).dump(); }
std::string to_json_line(const EvaluationLine& line) { return fields::to_value(line).dump(); }

std::string to_json(const std::vector<TrainedRow>& rows) { return fields::to_value(rows).dump(); }

std::map<std::string, double> measures(const TrainingLine& line) {
  fields::Writer writer;
  TrainingLine(line).visit_measures(writer);
  return writer.out.get<std::map<std::string, double>>();
}

Metrics read_metrics(const fs::path& path) {
  Metrics metrics;
  read_more(path, metrics);
  return metrics;
}

void read_more(const fs::path& path, Metrics& metrics) {
  std::string text = read_from(path, metrics.bytes - int64_t(metrics.last_line.size()));
  if (!text.starts_with(metrics.last_line)) {
    metrics = {};
    text = read_from(path, 0);
  }
  for_each_line(path, text, metrics.last_line.size(), metrics.lines + 1,
                [&](const std::string& line, const std::string& where) {
                  add(line, where, metrics);
                  ++metrics.lines, metrics.bytes += int64_t(line.size()), metrics.last_line = line;
                });
}

std::vector<routing::RoutingLine> read_routing(const fs::path& path) {
  std::vector<routing::RoutingLine> lines;
  for_each_line(path, read_from(path, 0), 0, 1, [&](const std::string& line, const std::string& where) {
    lines.push_back(routing::parse_json_line(line, where));
  });
  return lines;
}

RunRecord read_run_record(const fs::path& dir) {
  const fs::path path = dir / "run.json";
  return fields::from_value<RunRecord>(io::read_json(path), path.string());
}

}  // namespace moegraft::run
