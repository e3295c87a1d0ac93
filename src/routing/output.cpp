#include <array>
#include <cmath>
#include <limits>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/json.h"
#include "moegraft/routing/stats.h"

namespace moegraft::routing {
namespace {

// JSON has no NaN; six digits are plenty for a statistic and keep the lines short.
io::Json number(double value) {
  return std::isfinite(value) ? io::Json(std::round(value * 1e6) / 1e6) : io::Json(nullptr);
}

io::Json numbers(const std::vector<double>& values) {
  io::Json list = io::Json::array();
  for (const double value : values) list.push_back(number(value));
  return list;
}

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double number_of(const io::Json& value) { return value.is_null() ? kNone : value.get<double>(); }

ModalityLoad load_of(const io::Json& j) {
  ModalityLoad load;
  j.at("tokens").get_to(load.tokens);
  const auto measure = [&](const char* key) { return load.tokens > 0 ? number_of(j.at(key)) : kNone; };
  load.entropy = measure("entropy"), load.imbalance = measure("imbalance");
  load.router_entropy = measure("router_entropy"), load.confidence = measure("confidence");
  if (load.tokens == 0) return load;
  j.at("load").get_to(load.load_E);
  j.at("probability").get_to(load.probability_E);
  j.at("dead").get_to(load.dead);
  return load;
}

LayerRouting layer_of(const io::Json& j, const RoutingReport& report, const std::string& where) {
  const auto expect_experts = [&](size_t size) {
    MOEGRAFT_CHECK(int64_t(size) == report.num_experts, where, ": a layer lists ", size, " experts, expected ",
                   report.num_experts);
  };
  LayerRouting layer;
  layer.layer = j.at("layer");
  for (const auto& name : report.modality_names) {
    const auto& load = layer.modalities.emplace_back(load_of(j.at("modalities").at(name)));
    if (load.tokens > 0) expect_experts(load.load_E.size()), expect_experts(load.probability_E.size());
    const bool is_text = layer.modalities.size() == 1;
    layer.divergence_M.push_back(!is_text          ? number_of(j.at("divergence_bits").at(name))
                                 : load.tokens > 0 ? 0.0
                                                   : kNone);
  }
  layer.mutual_information = number_of(j.at("mutual_information_bits"));
  j.at("selectivity").get_to(layer.selectivity_E);
  expect_experts(layer.selectivity_E.size());
  return layer;
}

template <class F>
double mean_over(const std::vector<LayerRouting>& layers, F&& value_of) {
  double sum = 0, count = 0;
  for (const auto& layer : layers)
    if (const double value = value_of(layer); !std::isnan(value)) sum += value, ++count;
  return sum / count;  // NaN without any
}

}  // namespace

std::vector<std::pair<std::string, double>> scalars(const RoutingReport& report) {
  std::vector<std::pair<std::string, double>> out;
  const auto add = [&](const std::string& tag, double value) {
    if (std::isfinite(value)) out.emplace_back("routing/" + tag, value);
  };
  for (size_t m = 0; m < report.modality_names.size(); ++m) {
    const auto& name = report.modality_names[m];
    const auto mean = [&](auto member) {
      return mean_over(report.layers, [&](const LayerRouting& l) {
        return l.modalities[m].tokens ? double(l.modalities[m].*member) : NAN;
      });
    };
    add(name + "/entropy", mean(&ModalityLoad::entropy));
    add(name + "/imbalance", mean(&ModalityLoad::imbalance));
    add(name + "/dead_experts", mean(&ModalityLoad::dead));
    add(name + "/router_entropy", mean(&ModalityLoad::router_entropy));
    add(name + "/confidence", mean(&ModalityLoad::confidence));
    if (m == 0) continue;
    add("divergence/" + name, report.mean_divergence(m));
    for (const auto& layer : report.layers)
      add("divergence/" + name + "/layer_" + std::to_string(layer.layer), layer.divergence_M[m]);
  }
  add("mutual_information", mean_over(report.layers, [](const LayerRouting& l) { return l.mutual_information; }));
  return out;
}

std::string to_json_line(const RoutingReport& report, int64_t step) {
  io::Json mean = io::Json::object(), layers = io::Json::array();
  for (const auto& [tag, value] : scalars(report))
    if (tag.find("/layer_") == std::string::npos) mean[tag.substr(8)] = number(value);  // without "routing/"
  for (const auto& layer : report.layers) {
    io::Json modalities = io::Json::object(), divergence = io::Json::object();
    for (size_t m = 0; m < layer.modalities.size(); ++m) {
      const auto& load = layer.modalities[m];
      const auto& name = report.modality_names[m];
      if (m > 0) divergence[name] = number(layer.divergence_M[m]);
      if (load.tokens == 0) {
        modalities[name] = {{"tokens", 0}};
        continue;
      }
      modalities[name] = {{"tokens", load.tokens},
                          {"load", numbers(load.load_E)},
                          {"probability", numbers(load.probability_E)},
                          {"entropy", number(load.entropy)},
                          {"imbalance", number(load.imbalance)},
                          {"dead", load.dead},
                          {"router_entropy", number(load.router_entropy)},
                          {"confidence", number(load.confidence)}};
    }
    layers.push_back({{"layer", layer.layer},
                      {"modalities", modalities},
                      {"divergence_bits", divergence},
                      {"mutual_information_bits", number(layer.mutual_information)},
                      {"selectivity", layer.selectivity_E}});
  }
  return io::Json{{"step", step}, {"num_experts", report.num_experts}, {"mean", mean}, {"layers", layers}}.dump();
}

RoutingLine parse_json_line(const std::string& line, const std::string& where) {
  MOEGRAFT_CHECK(json_depth(line) <= kMostJsonDepth, where, ": brackets nest ", json_depth(line), " deep, expected ",
                 kMostJsonDepth, " at most");
  try {
    const auto j = io::Json::parse(line);
    RoutingLine out;
    j.at("step").get_to(out.step);
    j.at("num_experts").get_to(out.report.num_experts);
    std::set<std::string> others;
    for (const auto& layer : j.at("layers"))
      for (const auto& [name, load] : layer.at("modalities").items())
        if (name != "text") others.insert(name);
    out.report.modality_names = {"text"};
    out.report.modality_names.insert(out.report.modality_names.end(), others.begin(), others.end());
    for (const auto& layer : j.at("layers")) out.report.layers.push_back(layer_of(layer, out.report, where));
    return out;
  } catch (const io::Json::exception& e) {
    fail<UserError>(where, ": does not read as a line of routing statistics: ", shortened(e.what(), 160));
  }
}

std::array<uint8_t, 3> colour(double value) {
  constexpr double kStops[][3] = {{40, 10, 70},   {56, 62, 128},  {36, 116, 138},
                                  {44, 166, 118}, {140, 208, 72}, {250, 230, 50}};
  constexpr int kSpans = int(std::size(kStops)) - 1;
  const double at = std::min(1.0, std::max(0.0, value)) * kSpans;
  const int i = std::min(kSpans - 1, int(at));
  std::array<uint8_t, 3> rgb{};
  for (int c = 0; c < 3; ++c)
    rgb[c] = uint8_t(std::lround(kStops[i][c] + (at - i) * (kStops[i + 1][c] - kStops[i][c])));
  return rgb;
}

at::Tensor heat_map(const RoutingReport& report, int64_t cell) {
  const int64_t rows = std::max<int64_t>(1, int64_t(report.layers.size())),
                E = std::max<int64_t>(1, report.num_experts), gap = cell;
  const int64_t M = int64_t(report.modality_names.size()), panel = E * cell;
  auto picture = at::full({3, rows * cell, M * panel + (M - 1) * gap}, 255, at::kByte);
  auto pixels = picture.accessor<uint8_t, 3>();
  for (int64_t m = 0; m < M; ++m) {
    double largest = 0;
    for (const auto& layer : report.layers)
      for (const double load : layer.modalities[m].load_E) largest = std::max(largest, load);
    for (int64_t l = 0; l < int64_t(report.layers.size()); ++l) {
      const auto& load_E = report.layers[l].modalities[m].load_E;
      if (load_E.empty()) continue;  // white: no token of this modality
      for (int64_t e = 0; e < E; ++e) {
        const auto rgb = colour(load_E[e] / largest);
        for (int64_t c = 0; c < 3; ++c)
          for (int64_t y = l * cell; y < (l + 1) * cell; ++y)
            for (int64_t x = m * (panel + gap) + e * cell; x < m * (panel + gap) + (e + 1) * cell; ++x)
              pixels[c][y][x] = rgb[c];
      }
    }
  }
  return picture;
}

}  // namespace moegraft::routing
