#include "moegraft/kernels/expert_layout.h"

#include <mutex>

#include "cuda/stack.h"
#include "libtorch.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {

struct ExpertMatrices::State {
  std::vector<at::Tensor> list;
  std::once_flag looked;
  at::Tensor stacked;
};

ExpertMatrices::ExpertMatrices(std::vector<at::Tensor> list) : state_(std::make_shared<State>()) {
  state_->list = std::move(list);
}

const std::vector<at::Tensor>& ExpertMatrices::list() const {
  static const std::vector<at::Tensor> none;
  return state_ ? state_->list : none;
}

const at::Tensor& ExpertMatrices::stacked() const {
  static const at::Tensor none;
  if (empty()) return none;
  std::call_once(state_->looked, [this] { state_->stacked = cuda::stacked_view(state_->list); });
  return state_->stacked;
}

std::vector<at::Tensor>& ExpertMatrices::own() {
  // A new state in any case: the old one may be shared, or know a view of what is now to change.
  auto fresh = std::make_shared<State>();
  if (state_) fresh->list = state_.use_count() == 1 ? std::move(state_->list) : state_->list;
  state_ = std::move(fresh);
  return state_->list;
}

void join_experts(ExpertMatrices& gate_FD, ExpertMatrices& up_FD, ExpertMatrices& down_DF) {
  if (gate_FD.empty()) return;
  MOEGRAFT_INVARIANT(up_FD.size() == gate_FD.size() && down_DF.size() == gate_FD.size(),
                     "join_experts: ", gate_FD.size(), " gates, ", up_FD.size(), " ups, ", down_DF.size(), " downs");
  at::NoGradGuard no_grad;
  const int64_t E = int64_t(gate_FD.size()), F = gate_FD.front().size(0), D = gate_FD.front().size(1);
  if (!gate_FD.stacked().defined() || !up_FD.stacked().defined() ||
      !cuda::joined_view(gate_FD.stacked(), up_FD.stacked()).defined()) {
    const at::Tensor both = at::empty({E, 2 * F, D}, gate_FD.front().options());
    const auto place = [&](ExpertMatrices& matrices, int64_t row) {
      std::vector<at::Tensor>& list = matrices.own();
      for (int64_t e = 0; e < E; ++e) {
        const at::Tensor to = both[e].narrow(0, row, F);
        to.copy_(list[e]);
        list[e] = to;
      }
    };
    place(gate_FD, 0);
    place(up_FD, F);
  }
  if (!down_DF.stacked().defined()) down_DF = at::stack(down_DF.list()).unbind(0);
}

}  // namespace moegraft::kernels
