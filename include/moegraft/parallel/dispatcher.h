#pragma once
// Tokens travel to the processes that hold their experts, and their sums come back.

#include "moegraft/distributed/world.h"
#include "moegraft/model/dispatcher.h"

namespace moegraft::parallel {

// Experts are spread over the mesh's expert group, member e_i of ep holding [e_i*E/ep, (e_i+1)*E/ep). A token travels
// once to every process that holds one or more of its experts, with its weights, its group and the experts it wants
// there; the process sums what its experts make of it, and the token's own process adds those partial sums in rank
// order, in float32. Nothing is dropped. dispatch(), combine() and their backward passes are collective over the expert
// group: every member calls them equally often, in the same order, recording gradients or not alike
// (ForwardOptions::lockstep), with the same num_experts, top_k, num_groups, width and dtype. A member may have any
// number of tokens, also none that go anywhere. Per dispatch the host reads 6*ep numbers from the device; nothing else
// waits.
class ExpertParallelDispatcher : public model::TokenDispatcher {
 public:
  // base_is_sharded: agree() asks the whole world, because the data group shares collectives of a forward pass too.
  explicit ExpertParallelDispatcher(distributed::Mesh mesh, bool base_is_sharded = false);

  // UserError when the group's size does not divide num_experts.
  std::pair<int64_t, int64_t> local_experts(int64_t num_experts) const override;
  bool agree(bool mine) override;
  Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, const at::Tensor& topk_weights_TK,
                  int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) override;
  at::Tensor combine(const at::Tensor& out_XD, const Routed& routed) override;

 private:
  distributed::Mesh mesh_;
  bool base_is_sharded_;
};

// The dispatcher that a mesh needs: the one above, or with all experts here the local one, whose agree() asks the data
// group when the base is sharded over it.
std::shared_ptr<model::TokenDispatcher> make_dispatcher(const distributed::Mesh& mesh, bool base_is_sharded);

}  // namespace moegraft::parallel
