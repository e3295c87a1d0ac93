#include "moegraft/data/balance.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace moegraft::data {
namespace {

// Collects one quantity over steps.
class Collector {
 public:
  void add(const std::vector<int64_t>& ranks) {
    const int64_t sum = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    if (sum == 0) return;
    const double mean = double(sum) / double(ranks.size()),
                 largest = double(*std::max_element(ranks.begin(), ranks.end()));
    sum_mean_ += mean, sum_largest_ += largest, sum_ratio_ += largest / mean;
    worst_ = std::max(worst_, largest / mean);
    ++steps_;
  }
  Imbalance result() const {
    if (steps_ == 0) return {};
    return {sum_ratio_ / double(steps_), worst_, sum_largest_ / sum_mean_};
  }

 private:
  double sum_mean_ = 0, sum_largest_ = 0, sum_ratio_ = 0, worst_ = 0;
  int64_t steps_ = 0;
};

}  // namespace

Balance measure_balance(BatchStream& stream, const Share& share, int64_t longest_allowed, int64_t steps) {
  Balance out;
  Collector cost, new_tokens;
  for (; out.steps < steps; ++out.steps) {
    const StepOutline step = stream.skip();
    const Deal dealt = deal(step.tokens, share, longest_allowed);
    std::vector<int64_t> rank_cost(static_cast<size_t>(share.world_size), 0), rank_new(rank_cost);
    const auto rank_of = [&](int64_t part) { return static_cast<size_t>(part / share.accumulation); };
    for (size_t part = 0; part < dealt.cost.size(); ++part) {
      rank_cost[rank_of(static_cast<int64_t>(part))] += dealt.cost[part];
      out.empty_parts += dealt.tokens[part] == 0;
    }
    for (size_t s = 0; s < step.tokens.size(); ++s) rank_new[rank_of(dealt.part_of[s])] += step.new_tokens[s];
    cost.add(rank_cost);
    new_tokens.add(rank_new);
    const int64_t tokens = std::accumulate(step.tokens.begin(), step.tokens.end(), int64_t{0});
    out.tokens += tokens;
    out.sequences += static_cast<int64_t>(step.tokens.size());
    out.smallest_step = out.steps == 0 ? tokens : std::min(out.smallest_step, tokens);
    out.largest_step = std::max(out.largest_step, tokens);
    out.combinations_per_step += double(std::set<uint64_t>(step.modalities.begin(), step.modalities.end()).size());
  }
  out.combinations_per_step /= double(std::max<int64_t>(out.steps, 1));
  out.cost = cost.result();
  out.new_tokens = new_tokens.result();
  return out;
}

}  // namespace moegraft::data
