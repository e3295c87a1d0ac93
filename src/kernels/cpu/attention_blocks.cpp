// Flash attention (arXiv:2307.08691) on the CPU by block products, over packed sequences in their own layout [T, H, C]:
// nothing is padded, transposed or repeated in memory. ATen's CPU path serves one padded batch, and its bf16 backward
// runs at a tenth of the machine's product rate.
//
// Forward: 128 queries against up to 512 keys at a time, softmax carried along. Backward, per (sequence, key/value
// head): 128 queries against 64 keys, scores held with a row per key, so that P^T and dS^T are left operands of dV and
// dK as they are; dQ is summed transposed.

#include <algorithm>
#include <cmath>

#include "../attention.h"
#include "block_product.h"

namespace moegraft::kernels {
namespace {

constexpr int64_t kKeys = 512;  // keys of one forward softmax step
constexpr int64_t kLdScores = kKeys + 16,
                  kLdP = kKeys + 32;      // rows off the powers of two, which would put them into few sets of the cache
constexpr int64_t kQueries = 2 * kPanel;  // of one block of the backward pass: few enough for the caches, many enough
                                          // to be worth a pass over dK and dV
constexpr int64_t kLdDp = kQueries + 16, kLdDs = kQueries + 32;
constexpr float kNoMax = -3.0e38f;

// Keys [first, last) that the query at `position` sees.
struct Seen {
  int64_t first, last;
};
Seen seen_by(int64_t position, int64_t window) {
  return {window > 0 ? std::max<int64_t>(0, position - window + 1) : 0, position + 1};
}

template <class T>
class Forward {
 public:
  explicit Forward(const AttentionProblem& p) : p_(p) {
    out_.out_THC = at::empty(p.q_THC.sizes(), p.q_THC.options());
    out_.lse_TH = at::empty({p.q_THC.size(0), p.heads()}, p.q_THC.options().dtype(at::kFloat));
  }

  AttentionOutput run() {
    struct Task {
      int64_t sequence, group, begin, end;  // queries
      int64_t work;
    };
    std::vector<Task> tasks;
    const int64_t wanted = 4 * at::get_num_threads(), pairs = std::max<int64_t>(1, p_.num_sequences() * p_.groups());
    for (int64_t s = 0; s < p_.num_sequences(); ++s) {
      const int64_t queries = p_.cu_q[s + 1] - p_.cu_q[s];
      if (queries == 0) continue;
      const int64_t parts = std::clamp<int64_t>((wanted + pairs - 1) / pairs, 1, (queries + 127) / 128),
                    step = round_up((queries + parts - 1) / parts, kBlock);
      const int64_t past = p_.cu_kv[s + 1] - p_.cu_kv[s] - queries;
      for (int64_t g = 0; g < p_.groups(); ++g)
        for (int64_t at = 0; at < queries; at += step) {
          const int64_t end = std::min(at + step, queries);
          const Seen seen = seen_by(past + (at + end) / 2, p_.window);
          tasks.push_back({s, g, at, end, (end - at) * (seen.last - seen.first)});
        }
    }
    // The longest first: the last ones to end are short.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
    for_each_task(int64_t(tasks.size()), [&](int64_t i, Scratch& scratch) {
      work(tasks[i].sequence, tasks[i].group, tasks[i].begin, tasks[i].end, scratch);
    });
    return out_;
  }

 private:
  void work(int64_t s, int64_t g, int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t C = p_.head_dim(), H = p_.heads(), G = p_.groups(), keys_all = p_.cu_kv[s + 1] - p_.cu_kv[s],
                  past = keys_all - (p_.cu_q[s + 1] - p_.cu_q[s]);
    // Only the keys that these queries see.
    const int64_t first = seen_by(past + begin, p_.window).first / kPanel * kPanel, keys = past + end - first,
                  depth = round_up(keys, kPanel), Cp = padded_width(C);
    const T *k = data<T>(p_.k_SGC) + ((p_.cu_kv[s] + first) * G + g) * C,
            *v = data<T>(p_.v_SGC) + ((p_.cu_kv[s] + first) * G + g) * C;
    T* k_memory = scratch.take<T>(Panels<T>::elements(C, keys));
    const Panels<T> k_panels = pack_transposed(k, G * C, C, keys, k_memory);
    T* v_memory = scratch.take<T>(Panels<T>::elements(depth, C));
    const Panels<T> v_panels = pack_rows_deep(v, G * C, keys, C, depth, v_memory);
    T *q = scratch.take<T>(kBlock * padded_depth<T>(C)), *p = scratch.take<T>(kBlock * kLdP);
    float *scores = scratch.take<float>(kBlock * kLdScores), *o = scratch.take<float>(kBlock * Cp),
          *max = scratch.take<float>(kBlock), *sum = scratch.take<float>(kBlock);

    for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h)
      for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t m = std::min(kBlock, end - at), token = p_.cu_q[s] + at;
        copy_rows(data<T>(p_.q_THC) + (token * H + h) * C, H * C, m, C, q, padded_depth<T>(C));
        const int64_t from = (seen_by(past + at, p_.window).first - first) / kPanel * kPanel,
                      to = past + at + m - first;  // keys of this block, relative to `first`
        for (int64_t c = from; c < to; c += kKeys) {
          const int64_t count = std::min(kKeys, to - c), padded = round_up(count, kPanel);
          for (int64_t j = c / kPanel; j < (c + count + kPanel - 1) / kPanel; ++j)
            product(m, q, padded_depth<T>(C), k_panels, j, scores + (j * kPanel - c), kLdScores, false);
          for (int64_t r = 0; r < m; ++r) {
            const Seen seen = seen_by(past + at + r, p_.window);
            const int64_t lo = std::clamp<int64_t>(seen.first - first - c, 0, count),
                          hi = std::clamp<int64_t>(seen.last - first - c, lo, count);
            if (c == from) max[r] = kNoMax, sum[r] = 0;
            const float before = max[r], more = loops<T>().softmax(scores + r * kLdScores, float(p_.scale), lo, hi,
                                                                   padded, p + r * kLdP, &max[r]);
            if (max[r] != before && sum[r] != 0) {  // what the row has so far was relative to a smaller maximum
              const float factor = std::exp(before - max[r]);
              loops<float>().from_float(o + r * Cp, factor, o + r * Cp, Cp);
              sum[r] *= factor;
            }
            sum[r] += more;
          }
          product(m, p, kLdP, v_panels.depth_range(c, padded), o, Cp, c > from);
        }
        for (int64_t r = 0; r < m; ++r) {
          loops<T>().from_float(o + r * Cp, 1.0f / sum[r], mutable_data<T>(out_.out_THC) + ((token + r) * H + h) * C,
                                C);
          mutable_data<float>(out_.lse_TH)[(token + r) * H + h] = max[r] + std::log(sum[r]);
        }
      }
  }

  const AttentionProblem& p_;
  AttentionOutput out_;
};

template <class T>
class Backward {
 public:
  Backward(const AttentionProblem& p, const AttentionOutput& output, const at::Tensor& dout)
      : p_(p), output_(output), dout_(dout) {
    grads_ = {at::empty(p.q_THC.sizes(), p.q_THC.options()), at::empty(p.k_SGC.sizes(), p.k_SGC.options()),
              at::empty(p.v_SGC.sizes(), p.v_SGC.options())};
  }

  AttentionGradients run() {
    const int64_t G = p_.groups();
    for_each_task(p_.num_sequences() * G, [&](int64_t i, Scratch& scratch) { work(i / G, i % G, scratch); });
    return grads_;
  }

 private:
  void work(int64_t s, int64_t g, Scratch& scratch) {
    const int64_t C = p_.head_dim(), Cd = padded_depth<T>(C), Cp = padded_width(C), H = p_.heads(), G = p_.groups();
    const int64_t queries = p_.cu_q[s + 1] - p_.cu_q[s], keys = p_.cu_kv[s + 1] - p_.cu_kv[s], past = keys - queries,
                  depth = round_up(keys, kPanel);
    if (keys == 0) return;
    const T *k_rows = data<T>(p_.k_SGC) + (p_.cu_kv[s] * G + g) * C,
            *v_rows = data<T>(p_.v_SGC) + (p_.cu_kv[s] * G + g) * C;
    T *k = scratch.take<T>(depth * Cd), *v = scratch.take<T>(depth * Cd), *k_transposed = scratch.take<T>(Cp * depth);
    copy_rows(k_rows, G * C, keys, C, k, Cd);
    copy_rows(v_rows, G * C, keys, C, v, Cd);
    std::fill_n(k + keys * Cd, (depth - keys) * Cd, T{});
    std::fill_n(v + keys * Cd, (depth - keys) * Cd, T{});
    loops<T>().transpose(k, Cd, depth, C, k_transposed, depth);
    std::fill_n(k_transposed + C * depth, (Cp - C) * depth, T{});
    float *dk = scratch.take<float>(depth * Cp), *dv = scratch.take<float>(depth * Cp);
    std::fill_n(dk, depth * Cp, 0.0f);
    std::fill_n(dv, depth * Cp, 0.0f);
    Buffers b(scratch, C);
    for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h)
      for (int64_t at = 0; at < queries; at += kQueries)
        queries_block(s, h, at, std::min(kQueries, queries - at), past, keys, depth, k, v, k_transposed, dk, dv, b);
    loops<T>().round_rows(dk, Cp, mutable_data<T>(grads_.k_SGC) + (p_.cu_kv[s] * G + g) * C, G * C, keys, C);
    loops<T>().round_rows(dv, Cp, mutable_data<T>(grads_.v_SGC) + (p_.cu_kv[s] * G + g) * C, G * C, keys, C);
  }

  struct Buffers {
    Buffers(Scratch& scratch, int64_t C) {
      const int64_t across = Panels<T>::elements(C, kQueries), along = Panels<T>::elements(kQueries, C);
      q_across = scratch.take<T>(across), dout_across = scratch.take<T>(across);
      q_along = scratch.take<T>(along), dout_along = scratch.take<T>(along);
      p = scratch.take<T>(kPanel * kLdDs), ds = scratch.take<T>(kPanel * kLdDs),
      ds_panels = scratch.take<T>(kPanel * kQueries);
      scores = scratch.take<float>(kPanel * kLdDp), dp = scratch.take<float>(kPanel * kLdDp),
      dq = scratch.take<float>(padded_width(C) * kLdDp);
      lse = scratch.take<float>(kQueries), delta = scratch.take<float>(kQueries),
      dq_rows = scratch.take<float>(kQueries * C);
    }
    T *q_across, *dout_across, *q_along, *dout_along, *p, *ds, *ds_panels;
    float *scores, *dp, *dq, *lse, *delta, *dq_rows;
  };

  // All keys against n <= kQueries queries of one head.
  void queries_block(int64_t s, int64_t h, int64_t at, int64_t n, int64_t past, int64_t keys, int64_t depth, const T* k,
                     const T* v, const T* k_transposed, float* dk, float* dv, Buffers& b) {
    const int64_t C = p_.head_dim(), Cd = padded_depth<T>(C), Cp = padded_width(C), H = p_.heads(),
                  token = p_.cu_q[s] + at, width = round_up(n, kPanel);
    const T *q = data<T>(p_.q_THC) + (token * H + h) * C, *dout = data<T>(dout_) + (token * H + h) * C,
            *out = data<T>(output_.out_THC) + (token * H + h) * C;
    const Panels<T> q_across = pack_wide(q, H * C, C, n, b.q_across),
                    dout_across = pack_wide(dout, H * C, C, n, b.dout_across);
    const Panels<T> q_along = pack_rows_deep(q, H * C, n, C, width, b.q_along),
                    dout_along = pack_rows_deep(dout, H * C, n, C, width, b.dout_along);
    for (int64_t i = 0; i < n; ++i) {
      b.lse[i] = data<float>(output_.lse_TH)[(token + i) * H + h];
      b.delta[i] = loops<T>().dot(dout + i * H * C, out + i * H * C, C);
    }
    const int64_t first = seen_by(past + at, p_.window).first / kPanel * kPanel, last = past + at + n;
    for (int64_t j = first; j < last; j += kPanel) {
      fetch_rows(s, h, at + kQueries, (j - first) / kPanel, (last - first + kPanel - 1) / kPanel);
      const int64_t rows = kPanel;  // k, v, dk and dv are padded to whole panels
      const int64_t begin = std::max<int64_t>(0, j - past - at) / kPanel *
                            kPanel;  // queries before it see none of these keys; 0 for the first keys
      for (int64_t i = begin / kPanel; i < width / kPanel; ++i) {
        product(rows, k + j * Cd, Cd, q_across, i, b.scores + i * kPanel, kLdDp, false);
        product(rows, v + j * Cd, Cd, dout_across, i, b.dp + i * kPanel, kLdDp, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        // Queries i of this block with key j + r in sight: position - window < key <= position, position = past + at +
        // i.
        const int64_t key = j + r, lo = std::clamp<int64_t>(key - past - at, begin, n),
                      hi = key >= keys     ? lo
                           : p_.window > 0 ? std::clamp<int64_t>(key + p_.window - past - at, lo, n)
                                           : n;
        loops<T>().softmax_backward(b.scores + r * kLdDp + begin, b.dp + r * kLdDp + begin, b.lse + begin,
                                    b.delta + begin, float(p_.scale), lo - begin, hi - begin, width - begin,
                                    b.p + r * kLdDs + begin, b.ds + r * kLdDs + begin);
      }
      product(rows, b.p + begin, kLdDs, dout_along.depth_range(begin, width - begin), dv + j * Cp, Cp, true);
      product(rows, b.ds + begin, kLdDs, q_along.depth_range(begin, width - begin), dk + j * Cp, Cp, true);
      for (int64_t i = begin; i < width; i += kPanel) {
        const Panels<T> ds = pack_rows_deep(b.ds + i, kLdDs, rows, kPanel, kPanel, b.ds_panels + i * kPanel);
        product(Cp, k_transposed + j, depth, ds, 0, b.dq + i, kLdDp, j > first);
      }
    }
    loops<float>().transpose(b.dq, kLdDp, C, n, b.dq_rows, C);
    loops<T>().round_rows(b.dq_rows, C, mutable_data<T>(grads_.q_THC) + (token * H + h) * C, H * C, n, C);
  }

  // A part of the rows that the queries from `at` on will want.
  void fetch_rows(int64_t s, int64_t h, int64_t at, int64_t part, int64_t parts) const {
    const int64_t C = p_.head_dim(), H = p_.heads(), end = p_.cu_q[s + 1] - p_.cu_q[s],
                  share = (kQueries + parts - 1) / parts;
    for (int64_t i = at + part * share; i < std::min(at + std::min((part + 1) * share, kQueries), end); ++i) {
      const int64_t row = ((p_.cu_q[s] + i) * H + h) * C;
      fetch(data<T>(p_.q_THC) + row, C);
      fetch(data<T>(dout_) + row, C);
      fetch(data<T>(output_.out_THC) + row, C);
    }
  }

  // n <= kQueries rows of width C as a right operand [C, n], zero up to whole panels: few kernels serve all sizes.
  static Panels<T> pack_wide(const T* in, int64_t ld, int64_t C, int64_t n, T* out) {
    const Panels<T> panels{out, C, round_up(n, kPanel)};
    for (int64_t j = 0; j < panels.count(); ++j)
      loops<T>().pack_nk(in + j * kPanel * ld, ld, C, std::min(kPanel, n - j * kPanel),
                         out + j * kPanel * panels.depth(), panels.depth(), kPanel);
    return panels;
  }

  const AttentionProblem& p_;
  const AttentionOutput& output_;
  at::Tensor dout_;
  AttentionGradients grads_;
};

}  // namespace

bool attention_blocks_serve(const AttentionProblem& p) {
  return p.q_THC.is_cpu() && has_block_products(p.q_THC.scalar_type()) &&
         p.k_SGC.scalar_type() == p.q_THC.scalar_type() && p.v_SGC.scalar_type() == p.q_THC.scalar_type();
}
AttentionOutput attention_forward_blocks(const AttentionProblem& p) {
  return p.q_THC.scalar_type() == at::kFloat ? Forward<float>(p).run() : Forward<bf16>(p).run();
}
AttentionGradients attention_backward_blocks(const AttentionProblem& p, const AttentionOutput& output,
                                             const at::Tensor& dout) {
  return p.q_THC.scalar_type() == at::kFloat ? Backward<float>(p, output, dout).run()
                                             : Backward<bf16>(p, output, dout).run();
}

}  // namespace moegraft::kernels
