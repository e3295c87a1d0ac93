#include "tensor_slots.h"

#include "libtorch.h"

#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

using Role = TensorRole;

[[noreturn]] void misplaced(Role role, const char* scope) {
  fail<InvariantError>("role ", int(role), " is no tensor of ", scope);
}

}  // namespace

Slot slot(LayerWeights& w, Role role) {
  switch (role) {
    case Role::input_norm: return {nullptr, &w.input_norm_D};
    case Role::post_norm: return {nullptr, &w.post_norm_D};
    case Role::q: return {&w.attention.q};
    case Role::k: return {&w.attention.k};
    case Role::v: return {&w.attention.v};
    case Role::o: return {&w.attention.o};
    case Role::q_bias: return {nullptr, &w.attention.q_bias};
    case Role::k_bias: return {nullptr, &w.attention.k_bias};
    case Role::v_bias: return {nullptr, &w.attention.v_bias};
    case Role::o_bias: return {nullptr, &w.attention.o_bias};
    case Role::q_norm: return {nullptr, &w.attention.q_norm};
    case Role::k_norm: return {nullptr, &w.attention.k_norm};
    case Role::dense_gate:
    case Role::shared_gate: return {&w.dense.gate_ID};
    case Role::dense_up:
    case Role::shared_up: return {&w.dense.up_ID};
    case Role::dense_down:
    case Role::shared_down: return {&w.dense.down_DI};
    case Role::dense_gate_bias: return {nullptr, &w.dense.gate_bias_I};
    case Role::dense_up_bias: return {nullptr, &w.dense.up_bias_I};
    case Role::dense_down_bias: return {nullptr, &w.dense.down_bias_D};
    case Role::router: return {nullptr, &w.router_ED};
    case Role::router_correction: return {nullptr, &w.router_correction_E};
    case Role::shared_scale: return {nullptr, &w.shared_scale_1D};
    default: misplaced(role, "a layer");
  }
}

Slot slot(ResidentWeights& w, Role role) {
  switch (role) {
    case Role::embedding: return {&w.embedding};
    case Role::head: return {&w.head};
    case Role::final_norm: return {nullptr, &w.final_norm};
    default: misplaced(role, "the whole model");
  }
}

kernels::ExpertMatrices& matrices(ExpertWeights& w, Role role) {
  switch (role) {
    case Role::expert_gate: return w.gate_FD;
    case Role::expert_up: return w.up_FD;
    case Role::expert_down: return w.down_DF;
    default: misplaced(role, "an expert");
  }
}

at::Tensor& stacked(ExpertWeights& w, Role role) {
  switch (role) {
    case Role::expert_gate: return w.gate_EFD;
    case Role::expert_up: return w.up_EFD;
    case Role::expert_down: return w.down_EDF;
    default: misplaced(role, "an expert");
  }
}

}  // namespace moegraft::model
