#include "moegraft/graft/initialise_rows.h"
#include "moegraft/io/json.h"

namespace moegraft::graft {
namespace {

io::Json statistics(const RowStatistics& s) {
  return {{"mean_norm", s.mean_norm},
          {"rms_deviation", s.rms_deviation},
          {"effective_rank", s.effective_rank},
          {"mean_cosine", s.mean_cosine}};
}

}  // namespace

std::string RowsReport::to_json() const {
  io::Json j = {{"method", config::name_of(method)},  {"text", statistics(text)}, {"raw", statistics(raw)},
                {"embedding", statistics(embedding)}, {"head", statistics(head)}, {"warnings", warnings}};
  if (used_gw) {
    io::Json list = io::Json::array();
    for (const ot::Stage& s : stages) {
      list.push_back({{"epsilon", s.epsilon},
                      {"iterations", s.iterations},
                      {"sinkhorn_iterations", s.sinkhorn_iterations},
                      {"change", s.change},
                      {"marginal_error", s.marginal_error},
                      {"objective", s.objective},
                      {"row_perplexity", s.row_perplexity},
                      {"converged", s.converged},
                      {"reason", s.reason}});
    }
    j["gw"] = {{"points_x", points_x},
               {"points_y", points_y},
               {"objective", objective},
               {"row_perplexity", row_perplexity},
               {"uniform_perplexity", uniform_perplexity},
               {"converged", converged},
               {"reason", reason},
               {"stages", list}};
  }
  return j.dump();
}

}  // namespace moegraft::graft
