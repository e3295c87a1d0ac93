#pragma once
// A layer's matrices as one tensor.

#include "libtorch.h"

namespace moegraft::kernels::cuda {

// The list as one [E, m, n] view where its matrices lie at one distance in one storage; undefined otherwise.
inline at::Tensor stacked_view(const std::vector<at::Tensor>& list) {
  const at::Tensor& first = list.front();
  const int64_t count = int64_t(list.size()),
                step = count > 1 ? list[1].storage_offset() - first.storage_offset() : first.numel();
  bool view = step >= first.numel();
  for (int64_t e = 0; e < count && view; ++e)
    view = list[e].is_contiguous() && list[e].is_alias_of(first) && list[e].sizes() == first.sizes() &&
           list[e].storage_offset() == first.storage_offset() + e * step;
  return view ? first.as_strided({count, first.size(0), first.size(1)}, {step, first.size(1), 1}) : at::Tensor();
}

// gate and up [E, F, D] as one [E, 2F, D] view when each expert's up follows its gate; undefined otherwise.
inline at::Tensor joined_view(const at::Tensor& gate, const at::Tensor& up) {
  const int64_t E = gate.size(0), F = gate.size(1), D = gate.size(2);
  if (!up.is_alias_of(gate) || gate.stride(0) != up.stride(0) || gate.stride(0) < 2 * F * D ||
      up.storage_offset() != gate.storage_offset() + F * D)
    return {};
  return gate.as_strided({E, 2 * F, D}, {gate.stride(0), D, 1});
}

}  // namespace moegraft::kernels::cuda
