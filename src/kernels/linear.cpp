// Linear layers of the frozen base that share their input (q, k, v; gate and up). On the CPU one pass of block products
// over the input makes all outputs; elsewhere ATen.

#include <algorithm>

#include "cpu/block_product.h"
#include "cpu/cpu.h"
#include "cpu/panels.h"
#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRows = 256;  // of one task

struct Node : torch::CustomClassHolder {
  std::vector<std::shared_ptr<WeightPanels>> panels;
};

// `count` rows of width K as a left operand, copied where blocks would read past their end or the width wants padding.
template <class T>
std::pair<const T*, int64_t> left_operand(const T* rows, int64_t K, int64_t count, Scratch& scratch) {
  if (K == padded_depth<T>(K) && count == padded_rows(count)) return {rows, K};
  const int64_t ld = copied_depth<T>(K);
  T* copy = scratch.take<T>(padded_rows(count) * ld);
  copy_rows(rows, K, count, K, copy, ld);
  return {copy, ld};
}

// Blocks of rows, and of columns where the rows alone would leave threads without work.
struct Cut {
  int64_t rows, panels, parts;  // all rows; all panels of 64 columns, and in how many parts
  Cut(int64_t rows, int64_t panels)
      : rows(rows), panels(panels), parts(std::clamp<int64_t>(2 * at::get_num_threads() / row_blocks(), 1, panels)) {}
  int64_t row_blocks() const { return (rows + kRows - 1) / kRows; }
  int64_t tasks() const { return row_blocks() * parts; }
  int64_t begin(int64_t task) const { return task / parts * kRows; }
  int64_t count(int64_t task) const { return std::min(kRows, rows - begin(task)); }
  std::pair<int64_t, int64_t> range(int64_t task) const {
    return {task % parts * panels / parts, (task % parts + 1) * panels / parts};
  }
};

// y_i = x W_i^T for frozen W_i with panels; no bias.
template <class T>
std::vector<at::Tensor> forward_blocks(const at::Tensor& x, const Node& node) {
  const int64_t rows = x.size(0), K = x.size(1);
  std::vector<Panels<T>> panels;
  std::vector<at::Tensor> out;
  struct Place {
    size_t weight;
    int64_t panel;
  };
  std::vector<Place> places;
  for (size_t w = 0; w < node.panels.size(); ++w) {
    panels.push_back(node.panels[w]->template forward<T>());
    out.push_back(at::empty({rows, panels.back().n}, x.options()));
    for (int64_t j = 0; j < panels.back().count(); ++j) places.push_back({w, j});
  }
  const Cut cut(rows, int64_t(places.size()));
  for_each_task(cut.tasks(), [&](int64_t task, Scratch& scratch) {
    const int64_t begin = cut.begin(task), count = cut.count(task);
    const auto [in, ld_in] = left_operand(data<T>(x) + begin * K, K, count, scratch);
    float* room = scratch.take<float>(kBlock * kPanel);
    const auto [first, last] = cut.range(task);
    for (int64_t i = first; i < last; ++i) {
      const auto [w, j] = places[i];
      const Term<T> term{in, ld_in, &panels[w], j};
      const Range next = i + 1 < last ? panel_range(panels[places[i + 1].weight], places[i + 1].panel) : Range();
      sum_of_products(count, &term, 1, mutable_data<T>(out[w]) + begin * panels[w].n + j * kPanel, panels[w].n,
                      panels[w].columns(j), room, ahead(next));
    }
  });
  return out;
}

// dx = sum_i dy_i W_i; undefined dy_i count as zero.
template <class T>
at::Tensor backward_blocks(const variable_list& dy, const Node& node, int64_t rows, int64_t K,
                           const at::TensorOptions& options) {
  std::vector<Panels<T>> panels;
  std::vector<at::Tensor> in;
  for (size_t w = 0; w < node.panels.size(); ++w) {
    if (!dy[w].defined()) continue;
    panels.push_back(node.panels[w]->template backward<T>());
    in.push_back(dy[w].contiguous());
  }
  if (in.empty()) return {};
  at::Tensor dx = at::empty({rows, K}, options);
  const Cut cut(rows, (K + kPanel - 1) / kPanel);
  for_each_task(cut.tasks(), [&](int64_t task, Scratch& scratch) {
    const int64_t begin = cut.begin(task), count = cut.count(task);
    std::vector<Term<T>> terms;
    for (size_t w = 0; w < in.size(); ++w) {
      const auto [a, lda] = left_operand(data<T>(in[w]) + begin * in[w].size(1), in[w].size(1), count, scratch);
      terms.push_back({a, lda, &panels[w], 0});
    }
    float* room = scratch.take<float>(kBlock * kPanel);
    const auto [first, last] = cut.range(task);
    for (int64_t j = first; j < last; ++j) {
      for (auto& term : terms) term.j = j;
      sum_of_products(count, terms.data(), int64_t(terms.size()), mutable_data<T>(dx) + begin * K + j * kPanel, K,
                      std::min(kPanel, K - j * kPanel), room,
                      j + 1 < last ? ahead(panel_range(panels[0], j + 1)) : Ahead());
    }
  });
  return dx;
}

class FrozenLinear : public torch::autograd::Function<FrozenLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    ctx->saved_data["rows"] = x.size(0);
    ctx->saved_data["depth"] = x.size(1);
    ctx->saved_data["dtype"] = int64_t(x.scalar_type());
    return x.scalar_type() == at::kFloat ? forward_blocks<float>(x, *node) : forward_blocks<bf16>(x, *node);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    const auto dtype = at::ScalarType(ctx->saved_data["dtype"].toInt());
    const int64_t rows = ctx->saved_data["rows"].toInt(), depth = ctx->saved_data["depth"].toInt();
    return {dtype == at::kFloat ? backward_blocks<float>(grads, *node, rows, depth, at::TensorOptions(dtype))
                                : backward_blocks<bf16>(grads, *node, rows, depth, at::TensorOptions(dtype)),
            at::Tensor()};
  }
};

struct LinearCall {
  const at::Tensor& x_XK;
  const std::vector<FrozenLinearWeight>& weights;
};

bool blocks_serve(const LinearCall& c) {
  bool serve = c.x_XK.dim() == 2 && c.x_XK.size(0) > 0;
  for (const auto& w : c.weights)
    serve &= c.x_XK.is_cpu() && w.weight_NK.packed() && w.weight_NK.packed()->serve(c.x_XK.scalar_type());
  return serve;
}
std::vector<at::Tensor> run_blocks(const LinearCall& c) {
  std::vector<at::Tensor> out;
  auto node = c10::make_intrusive<Node>();
  for (const auto& w : c.weights) node->panels.push_back(w.weight_NK.packed());
  const at::Tensor x = c.x_XK.contiguous();
  if (recorded(x))
    out = FrozenLinear::apply(x, node);
  else
    out = x.scalar_type() == at::kFloat ? forward_blocks<float>(x, *node) : forward_blocks<bf16>(x, *node);
  for (size_t i = 0; i < c.weights.size(); ++i)
    if (c.weights[i].bias_N.defined()) out[i] = out[i] + c.weights[i].bias_N;
  return out;
}

std::vector<at::Tensor> run_aten(const LinearCall& c) {
  std::vector<at::Tensor> out;
  for (const auto& w : c.weights)
    out.push_back(at::linear(c.x_XK, w.weight_NK.tensor(),
                             w.bias_N.defined() ? std::optional<at::Tensor>(w.bias_N) : std::nullopt));
  return out;
}

struct Implementation {
  bool (*serves)(const LinearCall&);
  std::vector<at::Tensor> (*run)(const LinearCall&);
};
constexpr Implementation kImplementations[]{{blocks_serve, run_blocks}, {kAlways, run_aten}};

}  // namespace

std::vector<at::Tensor> frozen_linear(const at::Tensor& x_XK, const std::vector<FrozenLinearWeight>& weights) {
  RECORD_FUNCTION("moegraft::frozen_linear", {});
  const LinearCall call{x_XK, weights};
  return choose(kImplementations, call).run(call);
}

}  // namespace moegraft::kernels
