// Attention over a cache on the CPU.

#include <algorithm>
#include <limits>

#include "../attention.h"
#include "block_product.h"
#include "cpu.h"

namespace moegraft::kernels {
namespace {

bool has_dense_cache(const CachedAttention& a) {
  return has_cpu_path(a.q_THC) && a.keys_BSGC.is_contiguous() && a.values_BSGC.is_contiguous();
}

// One query for each of the first sequences of a cache, on the CPU: a library call per sequence costs more than the
// arithmetic. A task is a sequence's heads of one group; each head's scores, softmax and sum have one order.
template <class T>
at::Tensor decode(const CachedAttention& a) {
  const at::Tensor in = a.q_THC.contiguous();
  const int64_t B = in.size(0), H = in.size(1), C = in.size(2), room = a.keys_BSGC.size(1), G = a.keys_BSGC.size(2),
                repeat = H / G;
  at::Tensor out = at::empty(in.sizes(), in.options());
  at::parallel_for(0, B * G, 1, [&](int64_t from, int64_t end) {
    std::vector<float> scores, weights;
    for (int64_t task = from; task < end; ++task) {
      const int64_t b = task / G, g = task % G,
                    first = a.window > 0 ? std::max<int64_t>(0, a.kv_lengths[size_t(b)] - a.window) : 0,
                    count = a.kv_lengths[size_t(b)] - first;
      const int64_t begin = ((b * room + first) * G + g) * C;
      const T *keys = data<T>(a.keys_BSGC) + begin, *values = data<T>(a.values_BSGC) + begin;
      scores.resize(size_t(count)), weights.resize(size_t(count));
      for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
        const T* q = data<T>(in) + (b * H + h) * C;
        loops<T>().dots(q, keys, G * C, count, C, scores.data());
        float largest = -std::numeric_limits<float>::max();
        const float total =
            loops<float>().softmax(scores.data(), float(a.scale), 0, count, count, weights.data(), &largest);
        loops<float>().from_float(weights.data(), 1.0f / total, weights.data(), count);
        loops<T>().weighted_rows(weights.data(), values, G * C, count, mutable_data<T>(out) + (b * H + h) * C, C);
      }
    }
  });
  return out;
}

}  // namespace

bool attention_decode_serves(const CachedAttention& a) {
  bool one_each = has_dense_cache(a) && a.q_THC.size(0) == a.num_sequences();
  for (int64_t i = 0; i < a.num_sequences(); ++i) one_each &= a.cu_seqlens[size_t(i)] == i;
  return one_each;
}
at::Tensor attention_decode(const CachedAttention& a) {
  return a.q_THC.scalar_type() == at::kFloat ? decode<float>(a) : decode<bf16>(a);
}

bool attention_cached_blocks_serve(const CachedAttention& a) {
  return has_dense_cache(a) && has_block_products(a.q_THC.scalar_type());
}
at::Tensor attention_cached_blocks(const CachedAttention& a) {
  at::Tensor out = at::empty(a.q_THC.sizes(), a.q_THC.options());
  for (int64_t i = 0; i < a.num_sequences(); ++i) {
    const int64_t begin = a.cu_seqlens[i], queries = a.cu_seqlens[i + 1] - begin, keys = a.kv_lengths[i];
    if (queries == 0) continue;
    const AttentionProblem p{a.q_THC.narrow(0, begin, queries).contiguous(),
                             a.keys_BSGC[i].narrow(0, 0, keys),
                             a.values_BSGC[i].narrow(0, 0, keys),
                             {0, queries},
                             {0, keys},
                             a.window,
                             a.scale};
    out.narrow(0, begin, queries).copy_(attention_forward_blocks(p).out_THC);
  }
  return out;
}

}  // namespace moegraft::kernels
