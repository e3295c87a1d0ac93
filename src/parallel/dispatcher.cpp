#include "moegraft/parallel/dispatcher.h"

#include "libtorch.h"

#include "exchange.h"
#include "moegraft/base/check.h"

namespace moegraft::parallel {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Node : torch::CustomClassHolder {
  std::shared_ptr<const Exchange> exchange;
  at::Tensor x_XD, weights_XK;  // what arrived; only until forward() has handed it on
};
const Exchange& exchange_of(AutogradContext* ctx) {
  return *c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule())->exchange;
}

// Tokens and weights in one node: their gradients travel back in the same order everywhere.
class Dispatch : public torch::autograd::Function<Dispatch> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x_TD, const at::Tensor& weights_TK,
                               const c10::intrusive_ptr<Node>& node) {
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    return {std::move(node->x_XD), std::move(node->weights_XK)};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Exchange& exchange = exchange_of(ctx);
    auto weights = exchange.back(grads[1], "gradients of the experts' weights");
    auto x = exchange.back(grads[0], "gradients of the experts' inputs");
    const at::Tensor weights_TK =
        exchange.sum(weights.wait());  // a slot's gradient comes from one process, zeros from the others
    return {exchange.sum(x.wait()), weights_TK, at::Tensor()};
  }
};

class Combine : public torch::autograd::Function<Combine> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& out_XD, const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    return node->exchange->sum(node->exchange->back(out_XD, "the experts' sums").wait());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Exchange& exchange = exchange_of(ctx);
    return {exchange.there(exchange.gather(grads[0]), "gradients of the experts' sums").wait(), at::Tensor()};
  }
};

c10::intrusive_ptr<Node> make_node(std::shared_ptr<const Exchange> exchange) {
  auto node = c10::make_intrusive<Node>();
  node->exchange = std::move(exchange);
  return node;
}

bool ask(distributed::Communicator& group, bool mine) {
  at::Tensor all = at::full({1}, int64_t(mine), at::kLong);  // on the host, whatever computes
  group.all_reduce_min(all, "agreement on the forward pass").wait();
  return all.item<int64_t>() != 0;
}

// All experts are here, but their weights come from the others.
class LockstepDispatcher : public model::LocalDispatcher {
 public:
  explicit LockstepDispatcher(std::shared_ptr<distributed::Communicator> group) : group_(std::move(group)) {}
  bool agree(bool mine) override { return ask(*group_, mine); }

 private:
  std::shared_ptr<distributed::Communicator> group_;
};

}  // namespace

ExpertParallelDispatcher::ExpertParallelDispatcher(distributed::Mesh mesh, bool base_is_sharded)
    : mesh_(std::move(mesh)), base_is_sharded_(base_is_sharded) {}

std::pair<int64_t, int64_t> ExpertParallelDispatcher::local_experts(int64_t num_experts) const {
  const int64_t ep = mesh_.expert_size();
  MOEGRAFT_CHECK_USAGE(num_experts % ep == 0, "parallel.expert must divide the model's number of experts, ",
                       num_experts, "; got ", ep);
  return {mesh_.expert->rank() * (num_experts / ep), num_experts / ep};
}

bool ExpertParallelDispatcher::agree(bool mine) {
  return ask(base_is_sharded_ ? mesh_.world->all() : *mesh_.expert, mine);
}

model::TokenDispatcher::Routed ExpertParallelDispatcher::dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK,
                                                                  const at::Tensor& topk_weights_TK,
                                                                  int64_t num_experts, const at::Tensor& group_T,
                                                                  int64_t num_groups) {
  RECORD_FUNCTION("moegraft::expert_parallel_dispatch", {});
  const int64_t K = topk_ids_TK.size(1), each = local_experts(num_experts).second;
  MOEGRAFT_INVARIANT(x_TD.size(0) == topk_ids_TK.size(0) && topk_weights_TK.sizes() == topk_ids_TK.sizes(),
                     "dispatch: x ", x_TD.sizes(), ", ids ", topk_ids_TK.sizes(), ", weights ",
                     topk_weights_TK.sizes());
  auto exchange = std::make_shared<Exchange>();
  auto node = make_node(exchange);
  Routed routed;
  {
    at::NoGradGuard no_grad;
    *exchange = make_exchange(mesh_.expert, topk_ids_TK, each, (num_experts * 256 + K) * 256 + num_groups);
    // What the sort needs goes first and the tokens travel meanwhile. One int32 row: weights (float32 bits), ids there
    // or -1, group.
    std::vector<at::Tensor> first_id;
    for (int64_t w = 0; w < mesh_.expert_size(); ++w)
      first_id.push_back(at::full({exchange->sent_W[size_t(w)], 1}, w * each, topk_ids_TK.options()));
    at::Tensor ids_SK = exchange->gather(topk_ids_TK) - at::cat(first_id);
    ids_SK = ids_SK.masked_fill((ids_SK < 0).logical_or_(ids_SK >= each), -1);
    const at::Tensor weights_SK = exchange->gather(topk_weights_TK.detach()).to(at::kFloat).masked_fill(ids_SK < 0, 0);
    std::vector<at::Tensor> columns{weights_SK.contiguous().view(at::kInt), ids_SK.to(at::kInt)};
    const bool grouped = group_T.defined() && num_groups > 1;
    if (num_groups > 1)
      columns.push_back(grouped ? exchange->gather(group_T).to(at::kInt).unsqueeze(1)
                                : at::zeros({exchange->num_sent(), 1}, ids_SK.options().dtype(at::kInt)));
    auto facts = exchange->there(at::cat(columns, 1), "tokens' experts and weights");
    auto x = exchange->there(exchange->gather(x_TD.detach()), "tokens for the experts");
    const at::Tensor facts_X = facts.wait();
    node->weights_XK = facts_X.narrow(1, 0, K).contiguous().view(at::kFloat);
    routed.dispatch = kernels::make_dispatch(facts_X.narrow(1, K, K).to(at::kLong).contiguous(), each,
                                             num_groups > 1 ? facts_X.select(1, 2 * K).to(at::kLong) : at::Tensor(),
                                             num_groups, exchange->num_slots);
    node->x_XD = x.wait();
  }
  const auto arrived = Dispatch::apply(x_TD, topk_weights_TK, node);
  routed.x_XD = arrived[0];
  routed.weights_XK = arrived[1];
  routed.plan = exchange;
  return routed;
}

at::Tensor ExpertParallelDispatcher::combine(const at::Tensor& out_XD, const Routed& routed) {
  RECORD_FUNCTION("moegraft::expert_parallel_combine", {});
  MOEGRAFT_INVARIANT(routed.plan, "combine: these rows are not from dispatch()");
  return Combine::apply(out_XD, make_node(std::static_pointer_cast<const Exchange>(routed.plan)));
}

std::shared_ptr<model::TokenDispatcher> make_dispatcher(const distributed::Mesh& mesh, bool base_is_sharded) {
  if (mesh.expert_size() > 1) return std::make_shared<ExpertParallelDispatcher>(mesh, base_is_sharded);
  if (base_is_sharded && mesh.data_size() > 1) return std::make_shared<LockstepDispatcher>(mesh.data);
  return std::make_shared<model::LocalDispatcher>();
}

}  // namespace moegraft::parallel
