// Follows parallel/{gradients,dispatcher,sharded_weights,updates}.cpp; tests/tools/plan_test.cpp compares it with what
// their counters say.
#include "moegraft/planning/traffic.h"

#include "libtorch.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "moegraft/adapters/adapter.h"
#include "moegraft/model/expert_ring.h"
#include "moegraft/parallel/gradients.h"
#include "moegraft/parallel/updates.h"

namespace moegraft::planning {
namespace {

struct TrainedTensor {
  int64_t numel = 0;
  bool expert = false;
};

// From the last layer to the first, then the rows: as buckets are filled.
std::vector<TrainedTensor> trained_tensors(const MemoryRequest& r) {
  std::vector<TrainedTensor> all;
  const int64_t E = r.spec.num_experts / r.expert_size;
  for (int64_t l = r.spec.num_layers; l-- > 0;)
    for (const auto& a : r.adapters) {
      if (!a.layers.empty() && std::find(a.layers.begin(), a.layers.end(), l) == a.layers.end()) continue;
      for (const model::Site site : a.sites) {
        if (!adapters::has_site(r.spec, l, site)) continue;
        const bool expert = adapters::is_per_expert(r.spec, site);
        const std::vector<int64_t> sizes = adapters::trained_sizes(a.kind, a.rank, adapters::site_shape(r.spec, site));
        for (auto size = sizes.rbegin(); size != sizes.rend(); ++size)
          all.push_back({*size * (expert ? E : 1), expert});
      }
    }
  if (r.new_rows > 0)
    for (int i = 0; i < (r.spec.tie_word_embeddings ? 1 : 2); ++i)
      all.push_back({r.new_rows * r.spec.hidden_size, false});
  return all;
}

void add_gradients(std::vector<Message>& out, const MemoryRequest& r, const std::vector<TrainedTensor>& tensors,
                   double bucket_bytes) {
  for (const bool expert : {false, true}) {
    if (expert && r.data_size == 1) continue;  // every expert is here once
    const Group group = expert && r.expert_size > 1 ? Group::data : Group::world;
    double bucket = 0;
    const auto close = [&] {
      if (bucket > 0) out.push_back({Purpose::gradients, Collective::all_reduce, group, 1, std::exchange(bucket, 0)});
    };
    for (const auto& t : tensors) {
      if (t.expert != expert) continue;
      const double room = 4.0 * double(parallel::GradientReducer::room(t.numel));
      if (bucket > 0 && bucket + room > bucket_bytes) close();
      bucket += room;
    }
    close();
  }
  out.push_back({Purpose::gradients, Collective::all_reduce, Group::world, 1,
                 8.0 * double(1 + r.expert_size) * double(tensors.size())});  // which are there
}

void add_experts(std::vector<Message>& out, const MemoryRequest& r, int64_t micro_batches, int64_t recomputed) {
  if (r.expert_size == 1) return;
  const auto& s = r.spec;
  const double rows = double(r.tokens) * mean_visits(s.num_experts, s.num_experts_per_tok, r.expert_size),
               K = double(s.num_experts_per_tok), width = double(c10::elementSize(r.dtype));
  double forward = 0, backward = 0;
  for (int64_t l = 0; l < s.num_layers; ++l)
    if (s.layers[size_t(l)].sparse) forward += l < recomputed ? 2 : 1, backward += 1;
  const auto add = [&](double calls, double bytes) {
    out.push_back({Purpose::experts, Collective::all_to_all, Group::expert, calls * double(micro_batches), bytes});
  };
  add(forward, 24.0 * double(r.expert_size));                           // counts
  add(forward, rows * 4 * (2 * K + (r.gate_open ? 0 : 1)));             // weights, experts, group
  add(2 * (forward + backward), rows * double(s.hidden_size) * width);  // there and back, both ways
  add(backward, rows * 4 * K);                                          // gradients of the weights
}

// Layers that are gathered in a step: what the ring of buffers still holds is not.
int64_t gathered_layers(const model::DecoderSpec& s, int64_t micro_batches) {
  model::RingOrder ring;
  int64_t fetched = 0;
  const auto prefetch = [&](int64_t l) {
    if (l >= 0 && l < s.num_layers && s.layers[size_t(l)].sparse) fetched += ring.prefetch(l).fetch;
  };
  const auto use = [&](int64_t l) {
    if (!s.layers[size_t(l)].sparse) return;
    if (ring.find(l) < 0) prefetch(l);
    ring.use(l);
  };
  const auto step = [&] {
    for (int64_t i = 0; i < micro_batches; ++i) {
      for (int64_t l = 0; l < s.num_layers; ++l) prefetch(l + 1), use(l);
      for (int64_t l = s.num_layers; l-- > 0;) prefetch(l - 1), use(l);
    }
  };
  step();
  const int64_t first = fetched;
  step();
  return fetched - first;
}

void add_base(std::vector<Message>& out, const MemoryRequest& r, int64_t micro_batches) {
  if (!r.shard_base || r.data_size == 1) return;
  const int64_t layer = 3 * (r.spec.num_experts / r.expert_size) * r.spec.hidden_size * r.spec.moe_intermediate_size;
  const double part = double((layer + r.data_size - 1) / r.data_size) * double(c10::elementSize(r.dtype));
  out.push_back(
      {Purpose::base, Collective::all_gather, Group::data, double(gathered_layers(r.spec, micro_batches)), part});
}

void add_updates(std::vector<Message>& out, const MemoryRequest& r, const std::vector<TrainedTensor>& tensors) {
  if (!r.shard_optimizer) return;
  for (const bool expert : {false, true}) {
    const int64_t members = expert ? r.data_size : r.data_size * r.expert_size;
    double bytes = 0;
    for (const auto& t : tensors)
      if (t.expert == expert) bytes += 4.0 * double(t.numel);
    if (members == 1 || bytes == 0) continue;
    const double calls =
        std::max(double(members), std::ceil(bytes / (4.0 * double(parallel::UpdateSharding::kTogether))));
    out.push_back({Purpose::updates, Collective::broadcast, expert ? Group::data : Group::world, calls, bytes / calls});
  }
}

}  // namespace

const char* name_of(Purpose purpose) {
  constexpr std::array<const char*, 5> names{"gradients", "experts", "base", "updates", "agreement"};
  return names[size_t(purpose)];
}
const char* name_of(Collective collective) {
  constexpr std::array<const char*, 4> names{"all_reduce", "all_gather", "all_to_all", "broadcast"};
  return names[size_t(collective)];
}

double mean_visits(int64_t num_experts, int64_t top_k, int64_t parts) {
  const int64_t elsewhere = num_experts - num_experts / parts;
  double none = 1;  // C(elsewhere, K) / C(E, K): the chance that one process is not visited
  for (int64_t i = 0; i < top_k; ++i) none *= std::max(double(elsewhere - i), 0.0) / double(num_experts - i);
  return double(parts) * (1 - none);
}

std::vector<Message> count_traffic(const MemoryRequest& r, int64_t micro_batches, int64_t recompute_layers,
                                   double bucket_bytes) {
  std::vector<Message> out;
  if (r.expert_size * r.data_size == 1) return out;
  const bool sharded = r.shard_base && r.data_size > 1;
  const auto tensors = trained_tensors(r);
  add_gradients(out, r, tensors, bucket_bytes);
  add_experts(out, r, micro_batches, sharded ? r.spec.num_layers : recompute_layers);
  add_base(out, r, micro_batches);
  add_updates(out, r, tensors);
  if (sharded || r.expert_size > 1)
    out.push_back({Purpose::agreement, Collective::all_reduce,
                   r.expert_size == 1 ? Group::data
                   : sharded          ? Group::world
                                      : Group::expert,
                   double(micro_batches), 8});
  return out;
}

double total_bytes(const std::vector<Message>& messages, Purpose purpose) {
  double sum = 0;
  for (const auto& m : messages)
    if (m.purpose == purpose) sum += m.calls * m.bytes_each;
  return sum;
}

}  // namespace moegraft::planning
