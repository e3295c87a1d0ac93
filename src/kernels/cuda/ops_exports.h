#pragma once
// The definitions of ops.h over `Device`, an Ops<...> named before this is included: once per program, by ops.cpp or by
// the tests' emulated device.

#include <c10/core/DeviceGuard.h>

namespace moegraft::kernels::cuda {

Norm rms_norm_forward(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps,
                      at::ScalarType out, bool wide) {
  const c10::DeviceGuard guard(x.device());
  return Device::rms_norm_forward(x, delta, weight, eps, out, wide);
}
NormGradients rms_norm_backward(const at::Tensor& dy, const at::Tensor& dy_wide, const at::Tensor& dsum,
                                const at::Tensor& sum, const at::Tensor& weight, const at::Tensor& rstd, bool need_dw) {
  const c10::DeviceGuard guard(sum.device());
  return Device::rms_norm_backward(dy, dy_wide, dsum, sum, weight, rstd, need_dw);
}
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double sign) {
  const c10::DeviceGuard guard(x.device());
  return Device::rotary(x, cos, sin, sign);
}
Route route_forward(const at::Tensor& logits, int64_t top_k, bool renormalise) {
  const c10::DeviceGuard guard(logits.device());
  return Device::route_forward(logits, top_k, renormalise);
}
at::Tensor route_backward(const Route& routed, const at::Tensor& dweights, const at::Tensor& dprobs, bool renormalise) {
  const c10::DeviceGuard guard(routed.probs_TE.device());
  return Device::route_backward(routed, dweights, dprobs, renormalise);
}
void add_routing_sums(const at::Tensor& sums, const at::Tensor& probs, const at::Tensor& ids,
                      const at::Tensor& modality) {
  const c10::DeviceGuard guard(sums.device());
  Device::add_routing_sums(sums, probs, ids, modality);
}
Dispatch make_dispatch(const at::Tensor& ids, int64_t num_experts, const at::Tensor& group, int64_t num_groups,
                       int64_t num_rows) {
  const c10::DeviceGuard guard(ids.device());
  return Device::make_dispatch(ids, num_experts, group, num_groups, num_rows);
}
at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& token_of_row) {
  const c10::DeviceGuard guard(x.device());
  return Device::gather_rows(x, token_of_row);
}
void add_rows(const at::Tensor& from, const at::Tensor& rows, const at::Tensor& to, double factor) {
  const c10::DeviceGuard guard(to.device());
  Device::add_rows(from, rows, to, factor);
}
at::Tensor combine(const at::Tensor& y, const at::Tensor& weights, const at::Tensor& row_of_slot) {
  const c10::DeviceGuard guard(y.device());
  return Device::combine(y, weights, row_of_slot);
}
at::Tensor swiglu_forward(const at::Tensor& g, const at::Tensor& u) {
  const c10::DeviceGuard guard(g.device());
  return Device::swiglu_forward(g, u);
}
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& dh, const at::Tensor& g, const at::Tensor& u) {
  const c10::DeviceGuard guard(g.device());
  return Device::swiglu_backward(dh, g, u);
}
at::Tensor cross_entropy_rows(const at::Tensor& logits, const at::Tensor& targets, double scale, const at::Tensor& d) {
  const c10::DeviceGuard guard(logits.device());
  return Device::cross_entropy_rows(logits, targets, scale, d);
}

}  // namespace moegraft::kernels::cuda
