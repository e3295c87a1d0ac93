// Linked where CUDA is off.

#include "moegraft/base/check.h"
#include "ops.h"

namespace moegraft::kernels::cuda {
namespace {

[[noreturn]] void missing() {
  fail<InvariantError>("a device kernel was called in a build without CUDA: ask serves() first");
}

}  // namespace

bool holds(const at::Tensor&) { return false; }
Norm rms_norm_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, at::ScalarType, bool) {
  missing();
}
NormGradients rms_norm_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const at::Tensor&, bool) {
  missing();
}
at::Tensor rotary(const at::Tensor&, const at::Tensor&, const at::Tensor&, double) { missing(); }
Route route_forward(const at::Tensor&, int64_t, bool) { missing(); }
at::Tensor route_backward(const Route&, const at::Tensor&, const at::Tensor&, bool) { missing(); }
void add_routing_sums(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) { missing(); }
Dispatch make_dispatch(const at::Tensor&, int64_t, const at::Tensor&, int64_t, int64_t) { missing(); }
at::Tensor gather_rows(const at::Tensor&, const at::Tensor&) { missing(); }
void add_rows(const at::Tensor&, const at::Tensor&, const at::Tensor&, double) { missing(); }
at::Tensor combine(const at::Tensor&, const at::Tensor&, const at::Tensor&) { missing(); }
at::Tensor swiglu_forward(const at::Tensor&, const at::Tensor&) { missing(); }
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&) {
  missing();
}
at::Tensor cross_entropy_rows(const at::Tensor&, const at::Tensor&, double, const at::Tensor&) { missing(); }

}  // namespace moegraft::kernels::cuda
