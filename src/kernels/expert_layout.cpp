#include "moegraft/kernels/expert_layout.h"

#include "cuda/stack.h"
#include "libtorch.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {

void join_experts(std::vector<at::Tensor>& gate_FD, std::vector<at::Tensor>& up_FD, std::vector<at::Tensor>& down_DF) {
  if (gate_FD.empty()) return;
  MOEGRAFT_INVARIANT(up_FD.size() == gate_FD.size() && down_DF.size() == gate_FD.size(), "join_experts: ", gate_FD.size(), " gates, ", up_FD.size(), " ups, ", down_DF.size(), " downs");
  at::NoGradGuard no_grad;
  const int64_t E = int64_t(gate_FD.size()), F = gate_FD.front().size(0), D = gate_FD.front().size(1);
  const at::Tensor gate = cuda::stacked_view(gate_FD), up = cuda::stacked_view(up_FD);
  if (!gate.defined() || !up.defined() || !cuda::joined_view(gate, up).defined()) {
    const at::Tensor both = at::empty({E, 2 * F, D}, gate_FD.front().options());
    const auto place = [&](std::vector<at::Tensor>& list, int64_t row) {
      for (int64_t e = 0; e < E; ++e) {
        const at::Tensor to = both[e].narrow(0, row, F);
        to.copy_(list[e]);
        list[e] = to;
      }
    };
    place(gate_FD, 0);
    place(up_FD, F);
  }
  if (!cuda::stacked_view(down_DF).defined()) {
    const at::Tensor all = at::stack(down_DF);
    for (int64_t e = 0; e < E; ++e) down_DF[e] = all[e];
  }
}

}  // namespace moegraft::kernels
