#include "moegraft/data/deal.h"

#include <algorithm>
#include <numeric>

#include "moegraft/base/check.h"

namespace moegraft::data {

Deal deal(const std::vector<int64_t>& lengths, const Share& share, int64_t longest_allowed) {
  const auto parts = static_cast<size_t>(share.parts());
  MOEGRAFT_INVARIANT(share.accumulation > 0 && share.rank >= 0 && share.rank < share.world_size, "rank ", share.rank,
                     " of ", share.world_size, ", accumulation ", share.accumulation);
  const int64_t even = std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) / share.parts();
  std::vector<size_t> longest_first(lengths.size());
  std::iota(longest_first.begin(), longest_first.end(), size_t{0});
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });

  std::vector<int64_t> tokens(parts, 0), cost(parts, 0), part_of(lengths.size());
  for (const size_t s : longest_first) {
    MOEGRAFT_INVARIANT(lengths[s] > 0 && lengths[s] <= longest_allowed, "a sequence of ", lengths[s],
                       " tokens, at most ", longest_allowed);
    // There is room: the part with the fewest tokens has at most an even share.
    size_t best = parts;
    for (size_t p = 0; p < parts; ++p)
      if (tokens[p] + lengths[s] <= even + longest_allowed && (best == parts || cost[p] < cost[best])) best = p;
    part_of[s] = static_cast<int64_t>(best);
    tokens[best] += lengths[s];
    cost[best] += sequence_cost(lengths[s]);
  }

  std::vector<size_t> dearest_first(parts), given(parts);
  std::iota(dearest_first.begin(), dearest_first.end(), size_t{0});
  std::stable_sort(dearest_first.begin(), dearest_first.end(), [&](size_t a, size_t b) { return cost[a] > cost[b]; });
  std::vector<int64_t> rank_cost(static_cast<size_t>(share.world_size), 0);
  Deal out{std::move(part_of), std::vector<int64_t>(parts), std::vector<int64_t>(parts)};
  for (int64_t i = 0; i < share.accumulation; ++i) {
    std::vector<size_t> ranks(rank_cost.size());
    std::iota(ranks.begin(), ranks.end(), size_t{0});
    std::stable_sort(ranks.begin(), ranks.end(), [&](size_t a, size_t b) { return rank_cost[a] < rank_cost[b]; });
    for (size_t r = 0; r < ranks.size(); ++r) {
      const size_t from = dearest_first[static_cast<size_t>(i) * ranks.size() + r],
                   to = ranks[r] * static_cast<size_t>(share.accumulation) + static_cast<size_t>(i);
      given[from] = to;
      out.tokens[to] = tokens[from];
      out.cost[to] = cost[from];
      rank_cost[ranks[r]] += cost[from];
    }
  }
  for (int64_t& part : out.part_of) part = static_cast<int64_t>(given[static_cast<size_t>(part)]);
  return out;
}

int64_t largest_micro_batch(const DataConfig& config, const Share& share) {
  if (share.parts() == 1) return config.tokens_per_step;
  return std::min(config.tokens_per_step, config.tokens_per_step / share.parts() + config.sequence_length);
}

}  // namespace moegraft::data
