// Queries and keys made ready for attention: their norm and their rotation in one pass over each token on the CPU, with
// the bits of rms_norm and rotary one after the other; elsewhere those two.

#include "cpu/block_product.h"
#include "cpu/cpu.h"
#include "cuda/ops.h"
#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kTokenGrain = 4;

// One projection's rows: `norms` norms per token (none, one for all heads, or one for each head), each of `width`
// elements.
struct Part {
  at::Tensor x, norm, rstd;  // rstd [T * norms]; without norms x is not kept
  int64_t heads = 0, norms = 0, width = 0;
};

struct Node : torch::CustomClassHolder {
  std::vector<Part> parts;
  at::Tensor cos, sin;
};

// f(part, token) for every token.
template <class F>
void for_each_token(const Node& node, const F& f) {
  at::parallel_for(0, node.cos.size(0), kTokenGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < node.parts.size(); ++i)
      for (int64_t t = begin; t < end; ++t) f(i, t);
  });
}

template <class T>
void rotate_token(const Node& node, int64_t t, int64_t heads, const T* from, float sign, T* to) {
  const int64_t half = node.cos.size(1);
  const float *cos = data<float>(node.cos) + t * half, *sin = data<float>(node.sin) + t * half;
  for (int64_t h = 0; h < heads; ++h) loops<T>().rotate(from + h * 2 * half, cos, sin, sign, to + h * 2 * half, half);
}

template <class T>
variable_list forward_cpu(const Node& node, double eps) {
  variable_list out;
  for (const Part& p : node.parts)
    out.push_back(at::empty({p.x.size(0), p.heads, 2 * node.cos.size(1)}, p.x.options()));
  for_each_token(node, [&](size_t i, int64_t t) {
    const Part& p = node.parts[i];
    const int64_t row = t * p.x.size(1);
    const T* x = data<T>(p.x) + row;
    T* y = mutable_data<T>(out[i]) + row;
    for (int64_t n = 0; n < p.norms; ++n)
      mutable_data<float>(p.rstd)[t * p.norms + n] =
          loops<T>().rms_norm(x + n * p.width, data<T>(p.norm), float(eps), y + n * p.width, p.width);
    rotate_token(node, t, p.heads, p.norms ? y : x, 1.0f, y);
  });
  return out;
}

template <class T>
variable_list backward_cpu(const Node& node, const variable_list& grads) {
  variable_list dy, dx;
  for (size_t i = 0; i < node.parts.size(); ++i) {
    dy.push_back(grads[i].defined() ? grads[i].contiguous() : grads[i]);
    dx.push_back(grads[i].defined()
                     ? at::empty({grads[i].size(0), grads[i].size(1) * grads[i].size(2)}, grads[i].options())
                     : at::Tensor());
  }
  for_each_token(node, [&](size_t i, int64_t t) {
    if (!dy[i].defined()) return;
    const Part& p = node.parts[i];
    const int64_t row = t * dx[i].size(1);
    T* to = mutable_data<T>(dx[i]) + row;
    rotate_token(node, t, p.heads, data<T>(dy[i]) + row, -1.0f, to);
    for (int64_t n = 0; n < p.norms; ++n) {
      const int64_t at = n * p.width;
      loops<T>().rms_norm_backward(to + at, data<T>(p.x) + row + at, data<T>(p.norm),
                                   data<float>(p.rstd)[t * p.norms + n], to + at, p.width);
    }
  });
  return dx;
}

class NormRotary : public torch::autograd::Function<NormRotary> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList x, const c10::intrusive_ptr<Node>& node,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    ctx->saved_data["float32"] = x.front().scalar_type() == at::kFloat;
    for (size_t i = 0; i < x.size(); ++i) node->parts[i].x = x[i].detach();
    variable_list out =
        x.front().scalar_type() == at::kFloat ? forward_cpu<float>(*node, eps) : forward_cpu<bf16>(*node, eps);
    for (Part& p : node->parts)
      if (p.norms == 0) p.x.reset();
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    variable_list out =
        ctx->saved_data["float32"].toBool() ? backward_cpu<float>(*node, grads) : backward_cpu<bf16>(*node, grads);
    out.insert(out.end(), 2, at::Tensor());
    return out;
  }
};

struct HeadsCall {
  const std::vector<HeadRows>& rows;
  const at::Tensor &cos_TC, &sin_TC;
  double eps, clip;
};

bool one_pass_serves(const HeadsCall& c) {
  bool serves = c.clip <= 0;
  for (const HeadRows& r : c.rows) {
    serves &=
        has_cpu_path(r.x_TX) && !cuda::serves(r.x_TX) && r.x_TX.scalar_type() == c.rows.front().x_TX.scalar_type();
    if (r.norm.defined()) serves &= r.norm.scalar_type() == r.x_TX.scalar_type() && !r.norm.requires_grad();
  }
  return serves;
}
std::vector<at::Tensor> in_one_pass(const HeadsCall& c) {
  const int64_t T = c.cos_TC.size(0), C = 2 * c.cos_TC.size(1);
  auto node = c10::make_intrusive<Node>();
  node->cos = c.cos_TC.contiguous();
  node->sin = c.sin_TC.contiguous();
  variable_list x;
  for (const HeadRows& r : c.rows) {
    Part p{{}, {}, {}, r.num_heads, 0, 0};
    if (r.norm.defined()) {
      p.norm = r.norm.contiguous();
      p.width = r.norm.size(0);
      p.norms = r.num_heads * C / p.width;
      p.rstd = at::empty({T * p.norms}, r.x_TX.options().dtype(at::kFloat));
    }
    node->parts.push_back(std::move(p));
    x.push_back(r.x_TX.contiguous());
  }
  bool any = false;
  for (const at::Tensor& t : x) any |= recorded(t);
  if (any) return NormRotary::apply(at::TensorList(x), node, c.eps);
  for (size_t i = 0; i < x.size(); ++i) node->parts[i].x = x[i];
  return x.front().scalar_type() == at::kFloat ? forward_cpu<float>(*node, c.eps) : forward_cpu<bf16>(*node, c.eps);
}

std::vector<at::Tensor> one_by_one(const HeadsCall& c) {
  std::vector<at::Tensor> out;
  for (const HeadRows& r : c.rows) {
    const std::vector<int64_t> shape{r.x_TX.size(0), r.num_heads, 2 * c.cos_TC.size(1)};
    at::Tensor x = r.x_TX;
    if (r.norm.defined()) x = rms_norm(r.norm.size(0) == shape[2] ? x.view(shape) : x, r.norm, c.eps);
    if (c.clip > 0) x = x.clamp(-c.clip, c.clip);
    out.push_back(rotary(x.view(shape), c.cos_TC, c.sin_TC));
  }
  return out;
}

struct Implementation {
  bool (*serves)(const HeadsCall&);
  std::vector<at::Tensor> (*run)(const HeadsCall&);
};
constexpr Implementation kImplementations[]{{one_pass_serves, in_one_pass}, {kAlways, one_by_one}};

}  // namespace

std::vector<at::Tensor> norm_rotary(const std::vector<HeadRows>& rows, const at::Tensor& cos_TC,
                                    const at::Tensor& sin_TC, double eps, double clip) {
  RECORD_FUNCTION("moegraft::norm_rotary", {});
  const int64_t T = cos_TC.size(0), C = 2 * cos_TC.size(1);
  for (const HeadRows& r : rows) {
    MOEGRAFT_INVARIANT(r.x_TX.dim() == 2 && r.x_TX.size(0) == T && r.x_TX.size(1) == r.num_heads * C, "norm_rotary: x ",
                       r.x_TX.sizes(), ", cos ", cos_TC.sizes(), ", ", r.num_heads, " heads");
    MOEGRAFT_INVARIANT(!r.norm.defined() || r.norm.size(0) == C || r.norm.size(0) == r.num_heads * C, "norm_rotary: x ",
                       r.x_TX.sizes(), ", norm ", r.norm.sizes());
  }
  const HeadsCall call{rows, cos_TC, sin_TC, eps, clip};
  return choose(kImplementations, call).run(call);
}

}  // namespace moegraft::kernels
