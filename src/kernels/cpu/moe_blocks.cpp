// The expert FFN on the CPU by block products. A task is a strip: rows of one (expert, group), taken 256 at a time
// through
//   gather x -> gate, up (+ low rank) -> SwiGLU -> down (+ low rank) -> y of the sorted rows; then each token sums its
//   rows.
// Everything of a chunk stays in the second-level cache; only gate and up outputs and the thin products are written for
// the backward pass. Low-rank factors of the terms that act on a group are concatenated along their rank, so that gate
// and up (which share their input) cost one thin product.

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../moe.h"
#include "block_product.h"
#include "moe_factor_gradients.h"
#include "moe_factors.h"
#include "moegraft/base/check.h"
#include "panels.h"

namespace moegraft::kernels {
namespace {

template <class T>
constexpr int64_t kMostRows = sizeof(T) == 2 ? 384 : 256;  // worked on at a time

template <class T>
int64_t block_rows() {
  return micro_kernel<T>()->block_rows;
}

constexpr int64_t kRowsAcross = kPanel;  // up to which gradients of the input are formed across, where weights lie in
                                         // the forward layout alone (product_across)

template <class T>
bool across_may_serve(const MoeProblem& p) {
  return sizeof(T) == 4 && !p.weights.panels->stores_backward();
}

// Rows worked on at a time: many amortise reading an expert's weights from memory, but what is made of them should stay
// in the second-level cache.
int64_t chunk_rows(const MoeProblem& p) {
  const int64_t bytes = (p.model_width() + 2 * p.expert_width()) * int64_t(p.x_XD.element_size()),
                most = p.x_XD.element_size() == 2 ? kMostRows<bf16> : kMostRows<float>;
  return std::clamp<int64_t>((int64_t{1} << 20) / bytes, 256, most) / 32 * 32;
}
// Whether what is made for every row is more than second-level caches hold until it is read again.
bool is_large(const MoeProblem& p) {
  return p.x_XD.scalar_type() == at::kBFloat16 &&
         p.dispatch.num_rows() * p.model_width() * int64_t(p.x_XD.element_size()) > int64_t{4} << 20;
}
// `count` in parts of at most `most`, all but the last of equal size, in whole blocks.
template <class T>
int64_t even_part(int64_t count, int64_t most) {
  const int64_t parts = (count + most - 1) / most;
  return std::min(most, round_up((count + parts - 1) / parts, block_rows<T>()));
}

// Cut by sizes and thread count alone. Long ranges are split so that threads can share one expert.
template <class T>
std::vector<Strip> make_strips(const MoeProblem& p, const std::vector<int64_t>& offsets) {
  const Dispatch& d = p.dispatch;
  const int64_t chunk = chunk_rows(p),
                most = std::max(chunk, round_up(offsets.back() / (4 * at::get_num_threads()), chunk));
  std::vector<Strip> strips;
  for (int64_t b = 0; b < d.num_experts * d.num_groups; ++b) {
    const int64_t rows = offsets[b + 1] - offsets[b];
    if (rows == 0) continue;
    const int64_t part = even_part<T>(rows, most);
    for (int64_t at = offsets[b]; at < offsets[b + 1]; at += part)
      strips.push_back({b / d.num_groups, b % d.num_groups, at, std::min(at + part, offsets[b + 1])});
  }
  return strips;
}

// Strips in the order in which threads take them, the longest first: the last ones to end are short. Sums do not follow
// this order.
std::vector<size_t> by_length(const std::vector<Strip>& strips) {
  std::vector<size_t> order(strips.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return strips[a].end - strips[a].begin > strips[b].end - strips[b].begin;
  });
  return order;
}

template <class T>
void gather(const T* x, const int32_t* token, int64_t rows, int64_t width, int64_t ld, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    if (r + 3 < rows) fetch(x + token[r + 3] * width, width);  // the next rows lie anywhere
    copy_row(x + token[r] * width, width, out + r * ld);
  }
}

// t [rows, columns] = a * panels in T.
template <class T>
void thin(int64_t rows, const T* a, int64_t lda, const Panels<T>& b, T* t, int64_t ldt, float* room) {
  for (int64_t j = 0; j < b.count(); ++j) {
    const Term<T> term{a, lda, &b, j};
    sum_of_products(rows, &term, 1, t + j * kPanel, ldt, b.columns(j), room);
  }
}

// Room for the thin products of any set.
int64_t most_columns(const MoeProblem& p) {
  int64_t n = 0;
  for (const auto& site : p.terms)
    for (const auto& term : site) n += padded_width(term.A_EPX.size(1));
  return n + 32 * kSites;
}

// Views of what is saved. g and u lie as the backward pass reads them: chunk by chunk, panel by panel, [rows, 64] each,
// so that reading streams.
template <class T>
struct Saved {
  T *g = nullptr, *u = nullptr, *t_gu = nullptr, *t_d = nullptr;  // thin products are before their rows' weights
  int64_t ld_gu = 0, ld_d = 0;                                    // columns of the thin products
  static int64_t tile(int64_t chunk_begin, int64_t chunk_rows, int64_t width, int64_t panel, int64_t row) {
    return chunk_begin * round_up(width, kPanel) + panel * kPanel * chunk_rows + row * kPanel;
  }
};

// Each token's rows summed, weighted or not, in slot order; zeros for a token without any.
template <class T>
at::Tensor sum_rows(const MoeProblem& p, const at::Tensor& y_RD, bool weighted) {
  const int64_t X = p.x_XD.size(0), D = p.model_width(), K = p.dispatch.top_k;
  at::Tensor out = at::empty({X, D}, p.x_XD.options());
  const int32_t* row = data<int32_t>(p.dispatch.row_of_slot_TK);
  const T* y = data<T>(y_RD);
  T* to = mutable_data<T>(out);
  at::parallel_for(0, X, 64, [&](int64_t from, int64_t end) {
    std::vector<const T*> rows(K);
    std::vector<float> weights(K);
    for (int64_t t = from; t < end; ++t) {
      int64_t count = 0;
      for (int64_t k = 0; k < K; ++k) {
        if (row[t * K + k] < 0) continue;
        rows[count] = y + row[t * K + k] * D;
        weights[count++] = weighted ? data<float>(p.weights_XK)[t * K + k] : 1.0f;
      }
      loops<T>().weighted_sum(rows.data(), weights.data(), count, to + t * D, D);
    }
  });
  return out;
}

template <class T>
class Forward {
 public:
  Forward(const MoeProblem& p, bool save, bool keep_hidden)
      : p_(p), save_(save), offsets_(p.dispatch.host_offsets()), large_(is_large(p)) {
    p.weights.panels->template prepare_forward<T>();
    sets_ = rank_sets<T>(p);
    const int64_t R = p.dispatch.num_rows(), F = p.expert_width();
    int64_t gu = 0, d = 0;
    for (const auto& set : sets_) gu = std::max(gu, set.gate_up()), d = std::max(d, set.columns[kDown]);
    const auto options = p.x_XD.options();
    if (save) {
      saved_ = {at::empty({R, round_up(F, kPanel)}, options), at::empty({R, round_up(F, kPanel)}, options),
                at::empty({R, gu}, options), at::empty({R, d}, options)};
      view_ = {mutable_data<T>(saved_[0]),
               mutable_data<T>(saved_[1]),
               mutable_data<T>(saved_[2]),
               mutable_data<T>(saved_[3]),
               gu,
               d};
    }
    y_RD_ = at::empty({R, p.model_width()}, options);
    if (keep_hidden) hidden_RF_ = at::empty({R, F}, options);
  }

  MoeForward run() {
    const auto strips = make_strips<T>(p_, offsets_);
    const auto order = by_length(strips);
    KeptFactors<T>* kept =
        p_.cache
            ? &p_.cache->template content<KeptFactors<T>>(
                  p_, [&] { return std::make_unique<KeptFactors<T>>(p_.dispatch.num_experts, p_.dispatch.num_groups); })
            : nullptr;
    for_each_task(int64_t(strips.size()), [&](int64_t task, Scratch& scratch) {
      const Strip& s = strips[order[task]];
      Buffers b(p_, scratch);
      const auto f = kept ? kept->get(p_, sets_[s.group], s.expert, s.group, scratch)
                          : pack_factors<T>(p_, sets_[s.group], s.expert, false, scratch);
      const int64_t part = even_part<T>(s.end - s.begin, chunk_rows(p_));
      for (int64_t at = s.begin; at < s.end; at += part) chunk(s, f, at, std::min(part, s.end - at), b);
    });
    MoeForward out;
    out.out_XD = sum_rows<T>(p_, y_RD_, true);
    out.hidden_RF = hidden_RF_;
    if (save_) out.saved = saved_;
    return out;
  }

 private:
  struct Buffers {
    Buffers(const MoeProblem& p, Scratch& s)
        : ld_x(copied_depth<T>(p.model_width())), ld_h(copied_depth<T>(p.expert_width())) {
      x = s.take<T>(kMostRows<T> * ld_x);
      h = s.take<T>(kMostRows<T> * ld_h);
      t = s.take<T>(kMostRows<T> * most_columns(p));
      g = s.take<float>(kBlock * kPanel);
      u = s.take<float>(kBlock * kPanel);
      g_T = s.take<T>(kBlock * kPanel);
      u_T = s.take<T>(kBlock * kPanel);
    }
    int64_t ld_x, ld_h;
    T *x, *h, *t, *g_T, *u_T;
    float *g, *u;
  };

  void chunk(const Strip& s, const FactorPanels<T>& f, int64_t begin, int64_t rows, Buffers& b) const {
    const int64_t D = p_.model_width(), F = p_.expert_width(), step = block_rows<T>(),
                  blocks = (rows + step - 1) / step;
    const ExpertPanels& w = *p_.weights.panels;
    const Panels<T> gate = w.template forward<T>(s.expert, ExpertPanels::kGateMatrix),
                    up = w.template forward<T>(s.expert, ExpertPanels::kUpMatrix),
                    down = w.template forward<T>(s.expert, ExpertPanels::kDownMatrix);
    const RankSet& set = sets_[s.group];
    const int32_t* token = data<int32_t>(p_.dispatch.token_of_row_R) + begin;
    gather(data<T>(p_.x_XD), token, rows, D, b.ld_x, b.x);

    const int64_t gu = set.gate_up();
    if (gu) {
      thin(rows, b.x, b.ld_x, f.A_in[0], b.t, gu, b.g);
      for (int64_t r = 0; save_ && r < rows; ++r)
        std::memcpy(view_.t_gu + (begin + r) * view_.ld_gu, b.t + r * gu, size_t(gu) * sizeof(T));
      weigh_rows(p_, set, kGate, token, rows, b.t, gu);
      weigh_rows(p_, set, kUp, token, rows, b.t + set.columns[kGate], gu);
    }
    for (int64_t j = 0; j < gate.count(); ++j) {
      const int64_t width = gate.width(j), columns = gate.columns(j);
      for (int64_t r = 0; r < rows; r += step) {
        const int64_t m = std::min(step, rows - r), column = j * kPanel, tile = Saved<T>::tile(begin, rows, F, j, r);
        const Term<T> to_gate[]{{b.x + r * b.ld_x, b.ld_x, &gate, j}, {b.t + r * gu, gu, &f.B_out[kGate], j}};
        const Term<T> to_up[]{{b.x + r * b.ld_x, b.ld_x, &up, j},
                              {b.t + r * gu + (joint_thin<T>() ? 0 : set.columns[kGate]), gu, &f.B_out[kUp], j}};
        // In the order of use: up's panel beside the first product of gate's, then gate's next one.
        const bool last = j + 1 == gate.count();
        sum_of_products(m, to_gate, set.rank[kGate] ? 2 : 1, b.g, width, r == 0 ? ahead(panel_range(up, j)) : Ahead());
        sum_of_products(
            m, to_up, set.rank[kUp] ? 2 : 1, b.u, width,
            ahead(last ? panel_range(down, 0, r / step, blocks) : panel_range(gate, j + 1, r / step, blocks)));
        loops<T>().swiglu(b.g, b.u, width, save_ ? view_.g + tile : b.g_T, save_ ? view_.u + tile : b.u_T, kPanel,
                          b.h + r * b.ld_h + column, b.ld_h, m, columns, save_ && large_);
        if (columns < padded_depth<T>(columns))
          for (int64_t i = 0; i < m; ++i) b.h[(r + i) * b.ld_h + column + columns] = T{};
      }
    }
    if (hidden_RF_.defined())
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(mutable_data<T>(hidden_RF_) + (begin + r) * F, b.h + r * b.ld_h, size_t(F) * sizeof(T));

    const int64_t d = set.columns[kDown];
    if (d) {
      thin(rows, b.h, b.ld_h, f.A_in[1], b.t, d, b.g);
      for (int64_t r = 0; save_ && r < rows; ++r)
        std::memcpy(view_.t_d + (begin + r) * view_.ld_d, b.t + r * d, size_t(d) * sizeof(T));
      weigh_rows(p_, set, kDown, token, rows, b.t, d);
    }
    T* y = mutable_data<T>(y_RD_);
    for (int64_t j = 0; j < down.count(); ++j) {
      const Term<T> terms[]{{b.h, b.ld_h, &down, j}, {b.t, d, &f.B_out[kDown], j}};
      sum_of_products(rows, terms, d ? 2 : 1, y + begin * D + j * kPanel, D, down.columns(j), b.g,
                      ahead(panel_range(down, j + 1)), large_);
    }
  }

  const MoeProblem& p_;
  bool save_;
  std::vector<int64_t> offsets_;
  std::vector<RankSet> sets_;
  std::vector<at::Tensor> saved_;
  Saved<T> view_;
  at::Tensor y_RD_, hidden_RF_;
  bool large_;
};

// One factor's gradient: acc [columns, padded_width(width)] (+)= (s t)^T in.
template <class T>
void outer(int64_t rows, const T* t, int64_t ldt, const float* s, int64_t columns, T* in, int64_t ld, int64_t width,
           float* acc, bool accumulate) {
  outer_product(rows, t, ldt, s, columns, in, ld, width, acc, padded_width(width), accumulate);
}

template <class T>
class Backward {
 public:
  Backward(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD, const MoeNeeds& needs)
      : p_(p), needs_(needs), dout_(dout_XD), offsets_(p.dispatch.host_offsets()), large_(is_large(p)) {
    p.weights.panels->template prepare_forward<T>();
    p.weights.panels->template prepare_backward<T>();
    sets_ = rank_sets<T>(p);
    view_ = {mutable_data<T>(saved[0]), mutable_data<T>(saved[1]), mutable_data<T>(saved[2]),
             mutable_data<T>(saved[3]), saved[2].size(1),          saved[3].size(1)};
    const int64_t R = p.dispatch.num_rows();
    if (needs.x) dx_RD_ = at::empty({R, p.model_width()}, p.x_XD.options());
    weight_R_.resize(R);
    dweight_R_.resize(R, 0.0f);
    const int32_t* row = data<int32_t>(p.dispatch.row_of_slot_TK);
    for (int64_t i = 0; i < p.weights_XK.numel(); ++i)
      if (row[i] >= 0) weight_R_[row[i]] = data<float>(p.weights_XK)[i];
    for (int s = 0; s < kSites; ++s) {
      dweight_of_term_R_[s].resize(p.terms[s].size());
      for (size_t i = 0; i < p.terms[s].size(); ++i)
        if (needs.row_weight(s, i)) dweight_of_term_R_[s][i].resize(R, 0.0f);
    }
  }

  MoeGradients run() {
    strips_ = make_strips<T>(p_, offsets_);
    const auto order = by_length(strips_);
    MoeGradients g;
    FactorGradients factors(p_, needs_, sets_, strips_, g);
    for_each_task(int64_t(strips_.size()), [&](int64_t task, Scratch& scratch) {
      const size_t i = order[task];
      const Strip& s = strips_[i];
      Buffers b(p_, scratch);
      const auto f = pack_factors<T>(p_, sets_[s.group], s.expert, true, scratch);
      const FactorSums sums = factors.sums_of(int64_t(i), scratch);
      const int64_t part = even_part<T>(s.end - s.begin, chunk_rows(p_));
      for (int64_t at = s.begin; at < s.end; at += part)
        chunk(s, f, at, std::min(part, s.end - at), sums, at > s.begin, b);
      factors.finish_strip(int64_t(i), sums);
    });
    factors.finish();
    if (needs_.x) g.x_XD = sum_rows<T>(p_, dx_RD_, false);
    if (needs_.weights) {
      g.weights_XK = at::empty_like(p_.weights_XK);
      const int32_t* row = data<int32_t>(p_.dispatch.row_of_slot_TK);
      for (int64_t i = 0; i < g.weights_XK.numel(); ++i)
        mutable_data<float>(g.weights_XK)[i] = row[i] < 0 ? 0.0f : dweight_R_[row[i]];
    }
    for (int s = 0; s < kSites; ++s)
      for (const auto& dweight_R : dweight_of_term_R_[s])
        g.row_weights[s].push_back(dweight_R.empty() ? at::Tensor() : sum_of_tokens(dweight_R));
    return g;
  }

 private:
  struct Buffers {
    Buffers(const MoeProblem& p, Scratch& s)
        : ld_d(copied_depth<T>(p.model_width())), ld_f(copied_depth<T>(p.expert_width())) {
      const int64_t columns = most_columns(p);
      dy = s.take<T>(kMostRows<T> * ld_d);
      x = s.take<T>(kMostRows<T> * ld_d);
      h = s.take<T>(kMostRows<T> * ld_f);
      dg = s.take<T>(kMostRows<T> * ld_f);
      du = s.take<T>(kMostRows<T> * ld_f);
      dt_gu = s.take<T>(kMostRows<T> * columns);
      dt_d = s.take<T>(kMostRows<T> * columns);
      if (has_row_weights(p)) t = s.take<T>(kMostRows<T> * columns);
      out = s.take<float>(kBlock * kPanel);
      if (across_may_serve<T>(p)) {
        const int64_t most = round_up(std::max(p.model_width(), p.expert_width()), kPanel) * kPanel;
        in_across = s.take<T>(most);
        out_across = s.take<float>(most);
      }
    }
    T* in_across = nullptr;  // of product_across
    float* out_across = nullptr;
    int64_t ld_d, ld_f;
    T *dy, *x, *h, *dg, *du, *dt_gu, *dt_d, *t = nullptr;
    float* out;
  };

  // out [w.k, width] (+)= W in^T for the forward panels w of W and `rows` <= 64 rows of `in`, width =
  // padded_width(rows): dx = dy W, transposed, from the layout that the forward pass reads. Turning few rows takes less
  // than turning weights, which are read once, in the order they lie. `in` has zeros up to `width` rows.
  static void product_across(const Panels<T>& w, const T* in, int64_t ld, int64_t rows, bool accumulate, T* in_across,
                             float* out, const Range& after) {
    const int64_t width = padded_width(rows);
    loops<T>().transpose(in, ld, width, w.n, in_across, width);
    for (int64_t j = 0; j < w.count(); ++j) {
      const Panels<T> right{in_across + j * kPanel * width, w.columns(j), width};
      product(w.k, w.panel(j), w.width(j), right, 0, out, width, accumulate || j > 0,
              ahead(j + 1 < w.count() ? panel_range(w, j + 1) : after));
    }
  }

  // Thin products as the second factor met them.
  struct Thin {
    const T* t;
    int64_t ld;
  };

  // Of one site: the gradients of its rows' weights, <t, dt> times `factor` (null: ones), and dt times the weights.
  // Both [rows, ld] from row `begin` on.
  void through_weights(const RankSet& set, int site, int64_t begin, int64_t rows, const float* factor,
                       const Thin& saved, T* dt, int64_t ld) {
    for (const RankSet::Term& term : set.terms[site]) {
      std::vector<float>& dweight = dweight_of_term_R_[site][size_t(term.index)];
      for (int64_t r = 0; !dweight.empty() && r < rows; ++r)
        dweight[begin + r] = loops<T>().dot(saved.t + r * saved.ld + term.first, dt + r * ld + term.first, term.rank) *
                             (factor ? factor[r] : 1.0f);
    }
    weigh_rows(p_, set, site, data<int32_t>(p_.dispatch.token_of_row_R) + begin, rows, dt, ld);
  }
  // What was saved of these sites, whose columns lie side by side, times the rows' weights: in `room` where there are
  // any.
  Thin weigh_saved(const RankSet& set, std::initializer_list<int> sites, int64_t begin, int64_t rows, int64_t columns,
                   const Thin& saved, T* room) const {
    if (std::none_of(sites.begin(), sites.end(), [&](int site) { return weighted(p_, set, site); })) return saved;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(room + r * columns, saved.t + r * saved.ld, size_t(columns) * sizeof(T));
    for (const int site : sites)
      weigh_rows(p_, set, site, data<int32_t>(p_.dispatch.token_of_row_R) + begin, rows,
                 room + (site == kUp ? set.columns[kGate] : 0), columns);
    return {room, columns};
  }
  at::Tensor sum_of_tokens(const std::vector<float>& of_row_R) const {
    const int64_t X = p_.x_XD.size(0), K = p_.dispatch.top_k;
    const at::Tensor sums = at::zeros({X}, at::kFloat);
    const int32_t* row = data<int32_t>(p_.dispatch.row_of_slot_TK);
    float* to = mutable_data<float>(sums);
    for (int64_t i = 0; i < X * K; ++i)
      if (row[i] >= 0) to[i / K] += of_row_R[row[i]];
    return sums;
  }

  static void clear_padding(T* in, int64_t ld, int64_t rows) {
    for (int64_t r = rows; r < padded_width(rows); ++r) std::fill_n(in + r * ld, ld, T{});
  }
  // b.out [rows, 64] = columns [64 j, 64 (j + 1)) of what product_across left.
  static void from_across(Buffers& b, int64_t j, int64_t columns, int64_t rows) {
    const int64_t width = padded_width(rows);
    loops<float>().transpose(b.out_across + j * kPanel * width, width, std::min(kPanel, columns - j * kPanel), width,
                             b.out, kPanel);
  }

  void chunk(const Strip& s, const FactorPanels<T>& f, int64_t begin, int64_t rows, const FactorSums& sums,
             bool accumulate, Buffers& b) {
    const int64_t D = p_.model_width(), F = p_.expert_width(), step = block_rows<T>(),
                  blocks = (rows + step - 1) / step;
    const RankSet& set = sets_[s.group];
    const int64_t gu = set.gate_up(), d = set.columns[kDown];
    const int32_t* token = data<int32_t>(p_.dispatch.token_of_row_R) + begin;
    gather(data<T>(dout_), token, rows, D, b.ld_d, b.dy);
    const float* weight = weight_R_.data() + begin;
    const int64_t d_real = padded_width(set.rank[kDown]);
    const Thin t_d{view_.t_d + begin * view_.ld_d, view_.ld_d}, t_gu{view_.t_gu + begin * view_.ld_gu, view_.ld_gu};
    if (d) {
      thin(rows, b.dy, b.ld_d, f.B_in[kDown], b.dt_d, d, b.out);
      through_weights(set, kDown, begin, rows, weight, t_d, b.dt_d, d);
    }
    if (sums.wanted() && d) {
      const auto [t, ld] = weigh_saved(set, {kDown}, begin, rows, d, t_d, b.t);
      outer(rows, t, ld, weight, d_real, b.dy, b.ld_d, D, sums.B[kDown], accumulate);
    }

    // b.out holds dh of rows [r, r + m), columns of panel j.
    const auto finish_hidden = [&](int64_t j, int64_t r, int64_t m, int64_t ld) {
      const int64_t columns = std::min(kPanel, F - j * kPanel), row = begin + r, to = r * b.ld_f + j * kPanel,
                    tile = Saved<T>::tile(begin, rows, F, j, r);
      loops<T>().swiglu_backward(b.out, ld, view_.g + tile, view_.u + tile, kPanel, weight_R_.data() + row, b.h + to,
                                 b.dg + to, b.du + to, b.ld_f, dweight_R_.data() + row, m, columns);
      if (columns < padded_depth<T>(columns))
        for (int64_t i = 0; i < m; ++i)
          b.h[to + i * b.ld_f + columns] = b.dg[to + i * b.ld_f + columns] = b.du[to + i * b.ld_f + columns] = T{};
    };
    const ExpertPanels& w = *p_.weights.panels;
    const bool across = across_may_serve<T>(p_) && rows <= kRowsAcross;
    if (across) {
      const Panels<T> down = w.template forward<T>(s.expert, ExpertPanels::kDownMatrix),
                      gate = w.template forward<T>(s.expert, ExpertPanels::kGateMatrix);
      clear_padding(b.dy, b.ld_d, rows);
      product_across(down, b.dy, b.ld_d, rows, false, b.in_across, b.out_across, panel_range(gate, 0));
      for (int64_t j = 0; j * kPanel < F; ++j) {
        from_across(b, j, F, rows);
        if (d) product(rows, b.dt_d, d, f.A_out[1], j, b.out, kPanel, true);
        finish_hidden(j, 0, rows, kPanel);
      }
    }
    const Panels<T> to_h = w.template backward<T>(s.expert, ExpertPanels::kDownMatrix);
    for (int64_t column = 0; !across && column < F; column += kPanel) {
      const int64_t j = column / kPanel, width = to_h.width(j);
      for (int64_t r = 0; r < rows; r += step) {
        const int64_t m = std::min(step, rows - r), tile = Saved<T>::tile(begin, rows, F, j, r);
        const Term<T> terms[]{{b.dy + r * b.ld_d, b.ld_d, &to_h, j}, {b.dt_d + r * d, d, &f.A_out[1], j}};
        sum_of_products(m, terms, d ? 2 : 1, b.out, width,
                        ahead(range(view_.g + tile, m * kPanel), range(view_.u + tile, m * kPanel),
                              panel_range(to_h, j + 1, r / step, blocks)));
        finish_hidden(j, r, m, width);
      }
    }
    if (gu) {
      const int64_t g = set.columns[kGate];
      if (g) thin(rows, b.dg, b.ld_f, f.B_in[kGate], b.dt_gu, gu, b.out);
      if (set.columns[kUp]) thin(rows, b.du, b.ld_f, f.B_in[kUp], b.dt_gu + g, gu, b.out);
      through_weights(set, kGate, begin, rows, nullptr, t_gu, b.dt_gu, gu);
      through_weights(set, kUp, begin, rows, nullptr, {t_gu.t + g, t_gu.ld}, b.dt_gu + g, gu);
    }
    if (sums.wanted() && d) outer(rows, b.dt_d, d, weight, d_real, b.h, b.ld_f, F, sums.A[kDown], accumulate);
    if (sums.wanted() && gu) {
      const auto [t, ld] = weigh_saved(set, {kGate, kUp}, begin, rows, gu, t_gu, b.t);
      const int64_t g = set.columns[kGate], u = padded_width(set.rank[kUp]);
      if (g) outer<T>(rows, t, ld, nullptr, g, b.dg, b.ld_f, F, sums.B[kGate], accumulate);
      if (u) outer<T>(rows, t + g, ld, nullptr, u, b.du, b.ld_f, F, sums.B[kUp], accumulate);
      gather(data<T>(p_.x_XD), token, rows, D, b.ld_d, b.x);
      outer<T>(rows, b.dt_gu, gu, nullptr, gu, b.x, b.ld_d, D, sums.A[kGate], accumulate);
    }
    if (!needs_.x) return;
    T* dx = mutable_data<T>(dx_RD_);
    if (across) {
      const Panels<T> gate = w.template forward<T>(s.expert, ExpertPanels::kGateMatrix),
                      up = w.template forward<T>(s.expert, ExpertPanels::kUpMatrix);
      clear_padding(b.dg, b.ld_f, rows);
      clear_padding(b.du, b.ld_f, rows);
      product_across(gate, b.dg, b.ld_f, rows, false, b.in_across, b.out_across, panel_range(up, 0));
      product_across(up, b.du, b.ld_f, rows, true, b.in_across, b.out_across, {});
      for (int64_t j = 0; j * kPanel < D; ++j) {
        from_across(b, j, D, rows);
        if (gu) product(rows, b.dt_gu, gu, f.A_out[0], j, b.out, kPanel, true);
        loops<T>().round_rows(b.out, kPanel, dx + begin * D + j * kPanel, D, rows, std::min(kPanel, D - j * kPanel));
      }
      return;
    }
    const Panels<T> gate = w.template backward<T>(s.expert, ExpertPanels::kGateMatrix),
                    up = w.template backward<T>(s.expert, ExpertPanels::kUpMatrix);
    for (int64_t column = 0; column < D; column += kPanel) {
      const int64_t j = column / kPanel;
      const Term<T> terms[]{{b.dg, b.ld_f, &gate, j}, {b.du, b.ld_f, &up, j}, {b.dt_gu, gu, &f.A_out[0], j}};
      sum_of_products(rows, terms, gu ? 3 : 2, dx + begin * D + column, D, gate.columns(j), b.out,
                      ahead(panel_range(gate, j + 1), panel_range(up, j + 1)), large_);
    }
  }

  const MoeProblem& p_;
  const MoeNeeds& needs_;
  at::Tensor dout_;
  std::vector<int64_t> offsets_;
  std::vector<RankSet> sets_;
  Saved<T> view_;
  at::Tensor dx_RD_;
  std::vector<float> weight_R_, dweight_R_;
  std::array<std::vector<std::vector<float>>, kSites>
      dweight_of_term_R_;  // of the rows' weights of terms; empty where not needed
  std::vector<Strip> strips_;
  bool large_;
};

}  // namespace

bool moe_blocks_serve(const MoeProblem& p) {
  if (!p.weights.panels || !p.x_XD.is_cpu() || !p.weights.panels->serve(p.x_XD.scalar_type())) return false;
  for (const auto& site : p.terms)
    for (const auto& term : site)
      if (term.A_EPX.scalar_type() != at::kFloat || term.B_EXP.scalar_type() != at::kFloat) return false;
  return true;
}

MoeForward moe_forward_blocks(const MoeProblem& p, bool save, bool keep_hidden) {
  return p.x_XD.scalar_type() == at::kFloat ? Forward<float>(p, save, keep_hidden).run()
                                            : Forward<bf16>(p, save, keep_hidden).run();
}

MoeGradients moe_backward_blocks(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD,
                                 const MoeNeeds& needs) {
  return p.x_XD.scalar_type() == at::kFloat ? Backward<float>(p, saved, dout_XD, needs).run()
                                            : Backward<bf16>(p, saved, dout_XD, needs).run();
}

}  // namespace moegraft::kernels
