// Expert parallelism against all experts in one process: values and gradients.

#include "libtorch.h"

#include <gtest/gtest.h>

#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/parallel/dispatcher.h"
#include "parallel/exchange.h"
#include "join.h"

namespace moegraft::parallel {
namespace {

using distributed::Mesh;
using distributed::World;
using model::TokenDispatcher;

constexpr int64_t kExperts = 8, kWidth = 24, kDepth = 16, kRank = 3;

enum class Routes { any, one_expert, first_rank, even_experts, some_absent };
struct Case {
  const char* name;
  int64_t top_k, groups;
  Routes routes;
  std::vector<int64_t> tokens;  // of rank r: tokens[r % size]
};
const std::vector<Case> kCases{
    {"one expert per token", 1, 1, Routes::any, {7, 3}},
    {"two experts", 2, 2, Routes::any, {33, 18, 5, 40}},
    {"three experts, one token", 3, 3, Routes::any, {1, 9}},
    {"four experts", 4, 2, Routes::any, {20}},
    {"every token to one expert", 1, 2, Routes::one_expert, {12, 4}},
    {"every token to the first rank", 2, 2, Routes::first_rank, {12, 4}},
    {"experts that nobody chose", 2, 1, Routes::even_experts, {6, 11}},
    {"a rank without tokens", 2, 2, Routes::any, {0, 14}},
    {"slots that go nowhere", 3, 2, Routes::some_absent, {16, 10}},
};

struct Tokens {
  at::Tensor x_TD, ids_TK, weights_TK, group_T;
};

// The same numbers on every rank.
at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

Tokens make_tokens(const Case& c, int64_t rank, int64_t ep, at::ScalarType dtype) {
  const int64_t T = c.tokens[size_t(rank) % c.tokens.size()];
  auto g = generator(uint64_t(1000 + rank));
  Tokens t;
  t.x_TD = at::randn({T, kDepth}, g, at::kFloat).to(dtype);
  t.weights_TK = at::rand({T, c.top_k}, g, at::kFloat);
  t.group_T = at::randint(0, c.groups, {T}, g, at::kLong);
  const int64_t choice = c.routes == Routes::first_rank ? kExperts / ep : kExperts;
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < T; ++i)
    rows.push_back(at::randperm(choice, g, at::kLong).narrow(0, 0, std::min(choice, c.top_k)));
  t.ids_TK = T ? at::stack(rows) : at::empty({0, c.top_k}, at::kLong);
  if (c.routes == Routes::one_expert) t.ids_TK.fill_(5);
  if (c.routes == Routes::even_experts)
    t.ids_TK = t.ids_TK.div(2, "floor") * 2,
    t.ids_TK.select(1, 1).copy_((t.ids_TK.select(1, 0) + 2).remainder(kExperts));
  if (c.routes == Routes::some_absent) t.ids_TK.masked_fill_(at::rand(t.ids_TK.sizes(), g, at::kFloat) < 0.3, -1);
  return t;
}

struct Experts {
  std::vector<at::Tensor> gate_FD, up_FD, down_DF;
  std::vector<at::Tensor> factors;  // A, B of gate, up, down; all experts
};
Experts make_experts(at::ScalarType dtype) {
  auto g = generator(7);
  Experts w;
  for (int64_t e = 0; e < kExperts; ++e) {
    w.gate_FD.push_back(at::randn({kWidth, kDepth}, g, at::kFloat).mul(0.3).to(dtype));
    w.up_FD.push_back(at::randn({kWidth, kDepth}, g, at::kFloat).mul(0.3).to(dtype));
    w.down_DF.push_back(at::randn({kDepth, kWidth}, g, at::kFloat).mul(0.3).to(dtype));
  }
  for (const auto& [in, out] : {std::pair(kDepth, kWidth), std::pair(kDepth, kWidth), std::pair(kWidth, kDepth)}) {
    w.factors.push_back(at::randn({kExperts, kRank, in}, g, at::kFloat).mul(0.3));
    w.factors.push_back(at::randn({kExperts, out, kRank}, g, at::kFloat).mul(0.3));
  }
  return w;
}

struct Outcome {
  at::Tensor y_TD, x_grad_TD, weights_grad_TK;
  std::vector<at::Tensor> factor_grads;  // of the dispatcher's experts
};

// One MoE block under a loss whose gradient is `dy_TD`.
Outcome run(TokenDispatcher& dispatcher, const Experts& experts, const Tokens& tokens, const at::Tensor& dy_TD,
            int64_t groups) {
  const auto [first, count] = dispatcher.local_experts(kExperts);
  const at::Tensor x = tokens.x_TD.clone().requires_grad_(true),
                   weights = tokens.weights_TK.clone().requires_grad_(true);
  const auto slice = [&, first = first, count = count](const std::vector<at::Tensor>& v) {
    return std::vector<at::Tensor>(v.begin() + first, v.begin() + first + count);
  };
  std::vector<at::Tensor> leaves;
  for (const auto& f : experts.factors) leaves.push_back(f.narrow(0, first, count).clone().requires_grad_(true));
  std::vector<bool> acts(size_t(groups), true);
  if (groups > 1) acts[0] = false;  // text
  const auto term = [&](size_t i) {
    return std::vector<kernels::ExpertLowRank>{{leaves[2 * i], leaves[2 * i + 1], 0.5, acts}};
  };
  const auto routed =
      dispatcher.dispatch(x, tokens.ids_TK, weights, kExperts, groups > 1 ? tokens.group_T : at::Tensor(), groups);
  EXPECT_EQ(routed.dispatch.num_experts, count);
  const at::Tensor out =
      kernels::moe_ffn(routed.x_XD, routed.weights_XK, routed.dispatch,
                       {slice(experts.gate_FD), slice(experts.up_FD), slice(experts.down_DF), {}, {}, {}, {}},
                       {term(0), term(1), term(2)});
  const at::Tensor y = dispatcher.combine(out, routed);
  y.backward(dy_TD);
  Outcome o{y.detach(), x.grad(), weights.grad(), {}};
  for (const auto& leaf : leaves)
    o.factor_grads.push_back(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf).detach());
  return o;
}

void expect_near(const at::Tensor& got, const at::Tensor& want, double relative, const std::string& what) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  if (want.numel() == 0) return;
  const double error = (got.to(at::kDouble) - want.to(at::kDouble)).abs().max().item<double>(),
               scale = want.to(at::kDouble).abs().max().item<double>();
  EXPECT_LE(error, relative * scale) << what;
}

Tokens join(const std::vector<Tokens>& all) {
  const auto cat = [&](auto member) {
    std::vector<at::Tensor> parts;
    for (const auto& t : all) parts.push_back(t.*member);
    return at::cat(parts);
  };
  return {cat(&Tokens::x_TD), cat(&Tokens::ids_TK), cat(&Tokens::weights_TK), cat(&Tokens::group_T)};
}

void check_parity(const Mesh& mesh, const Case& c) {
  SCOPED_TRACE(c.name);
  const int64_t world = mesh.world->size(), rank = mesh.world->rank(), ep = mesh.expert_size();
  const Experts experts = make_experts(at::kFloat);
  std::vector<Tokens> all;
  int64_t before = 0, total = 0;
  for (int64_t r = 0; r < world; ++r) {
    all.push_back(make_tokens(c, r, ep, at::kFloat));
    if (r < rank) before += all.back().x_TD.size(0);
    total += all.back().x_TD.size(0);
  }
  const Tokens& mine = all[size_t(rank)];
  const int64_t T = mine.x_TD.size(0);
  const at::Tensor dy = at::randn({total, kDepth}, generator(3), at::kFloat);
  model::LocalDispatcher local;
  Tokens together = join(all);
  const at::Tensor nowhere =
      together.ids_TK < 0;  // one process has no such slots: expert 0 with no weight says the same
  together.ids_TK = together.ids_TK.masked_fill(nowhere, 0);
  together.weights_TK = together.weights_TK.masked_fill(nowhere, 0);
  Outcome want = run(local, experts, together, dy, c.groups);
  want.weights_grad_TK = want.weights_grad_TK.masked_fill(nowhere, 0);

  ExpertParallelDispatcher dispatcher(mesh);
  Outcome got = run(dispatcher, experts, mine, dy.narrow(0, before, T), c.groups);
  expect_near(got.y_TD, want.y_TD.narrow(0, before, T), 1e-5, "y");
  expect_near(got.x_grad_TD, want.x_grad_TD.narrow(0, before, T), 1e-5, "gradient of x");
  expect_near(got.weights_grad_TK, want.weights_grad_TK.narrow(0, before, T), 1e-5, "gradient of the weights");
  const auto [first, count] = dispatcher.local_experts(kExperts);
  std::vector<at::Tensor> flat;
  for (const auto& g : got.factor_grads) flat.push_back(g.reshape({-1}));
  at::Tensor sums = at::cat(flat);
  mesh.data->all_reduce(sums, "test").wait();
  for (size_t i = 0, at_element = 0; i < got.factor_grads.size(); at_element += size_t(got.factor_grads[i++].numel())) {
    got.factor_grads[i] =
        sums.narrow(0, int64_t(at_element), got.factor_grads[i].numel()).view(got.factor_grads[i].sizes());
    const at::Tensor reference = want.factor_grads[i].narrow(0, first, count);
    const double scale = want.factor_grads[i].abs().max().item<double>();
    EXPECT_LE((got.factor_grads[i] - reference).abs().max().item<double>(), 1e-5 * scale) << "factor " << i;
    for (int64_t e = 0; e < count; ++e)
      if (reference[e].abs().max().item<double>() == 0) {
        EXPECT_EQ(got.factor_grads[i][e].abs().max().item<double>(), 0) << "an expert without rows, factor " << i;
      }
  }
  if (c.groups != 2) return;
  // Again: the same bits.
  const Outcome again = run(dispatcher, experts, mine, dy.narrow(0, before, T), c.groups);
  EXPECT_TRUE(at::equal(again.y_TD, got.y_TD) && at::equal(again.x_grad_TD, got.x_grad_TD) &&
              at::equal(again.weights_grad_TK, got.weights_grad_TK));
}

RANK_BODY(dispatcher_two) {
  const auto world = testing::join();
  const Mesh mesh = distributed::make_mesh(world, 2);
  for (const Case& c : kCases) check_parity(mesh, c);

  // Half precision: no further from float32 than one process is, for the partial sums are rounded once more.
  const Case c = kCases[1];
  std::vector<at::Tensor> error;
  const Tokens tokens = make_tokens(c, world->rank(), 2, at::kBFloat16);
  Tokens wide = tokens;
  wide.x_TD = wide.x_TD.to(at::kFloat);
  Experts experts = make_experts(at::kBFloat16), exact = experts;
  for (auto* list : {&exact.gate_FD, &exact.up_FD, &exact.down_DF})
    for (auto& t : *list) t = t.to(at::kFloat);
  const at::Tensor dy = at::randn(tokens.x_TD.sizes(), generator(4), at::kFloat).to(at::kBFloat16);
  model::LocalDispatcher local;
  ExpertParallelDispatcher spread(mesh);
  const Outcome want = run(local, exact, wide, dy.to(at::kFloat), c.groups),
                one = run(local, experts, tokens, dy, c.groups), two = run(spread, experts, tokens, dy, c.groups);
  const auto worst = [](const at::Tensor& a, const at::Tensor& b) {
    return (a.to(at::kFloat) - b).abs().max().item<double>();
  };
  EXPECT_EQ(two.y_TD.scalar_type(), at::kBFloat16);
  EXPECT_LE(worst(two.y_TD, want.y_TD), 2 * worst(one.y_TD, want.y_TD) + 1e-3);
  EXPECT_LE(worst(two.x_grad_TD, want.x_grad_TD), 2 * worst(one.x_grad_TD, want.x_grad_TD) + 1e-3);
  EXPECT_LE(worst(two.weights_grad_TK, want.weights_grad_TK),
            2 * worst(one.weights_grad_TK, want.weights_grad_TK) + 1e-3);

  // Without gradients; then layouts that do not fit, told everywhere; agreement.
  {
    at::NoGradGuard no_grad;
    const auto routed =
        spread.dispatch(wide.x_TD, tokens.ids_TK, tokens.weights_TK, kExperts, tokens.group_T, c.groups);
    EXPECT_FALSE(routed.x_XD.requires_grad());
    EXPECT_EQ(routed.x_XD.size(0), routed.weights_XK.size(0));
  }
  EXPECT_EQ(spread.local_experts(6), std::pair(3 * world->rank(), int64_t{3}));
  EXPECT_THROW(spread.local_experts(7), UsageError);
  EXPECT_THROW(
      spread.dispatch(wide.x_TD, tokens.ids_TK, tokens.weights_TK, kExperts, tokens.group_T, 2 + world->rank()),
      InvariantError);
  EXPECT_TRUE(spread.agree(true));
  EXPECT_FALSE(spread.agree(world->rank() == 0));
  EXPECT_FALSE(spread.agree(false));
}
TEST(ExpertParallel, TwoRanksAreOneProcess) { testing::run_ranks("dispatcher_two", 2); }

RANK_BODY(dispatcher_four) {
  const auto world = testing::join();
  for (const int64_t ep : {4, 2}) {
    SCOPED_TRACE(ep);
    const Mesh mesh = distributed::make_mesh(world, ep);
    for (const Case& c : kCases) check_parity(mesh, c);
    ExpertParallelDispatcher group(mesh), everybody(mesh, true);
    EXPECT_EQ(group.agree(world->rank() < 2), ep == 2 && world->rank() < 2);
    EXPECT_FALSE(everybody.agree(world->rank() != 3));
    EXPECT_TRUE(everybody.agree(true));
  }
  const Mesh data = distributed::make_mesh(world, 1);
  EXPECT_TRUE(make_dispatcher(data, false)->agree(true));
  EXPECT_EQ(make_dispatcher(data, false)->agree(world->rank() == 1), world->rank() == 1) << "nothing is shared";
  EXPECT_FALSE(make_dispatcher(data, true)->agree(world->rank() == 1));
}
TEST(ExpertParallel, FourRanksInBothMeshesAreOneProcess) { testing::run_ranks("dispatcher_four", 4); }

TEST(ExpertParallel, TheDevicesWayIsTheHosts) {
  auto g = generator(5);
  const Mesh mesh = distributed::make_mesh(World::join({}), 1);
  for (const int64_t T : {0, 1, 50}) {
    const at::Tensor ids = at::randint(-1, 12, {T, 3}, g, at::kLong);
    for (const int64_t members : {1, 3, 4}) {
      const int64_t each = 12 / members;
      const Wanted got = wanted_on_device(ids, each, members);
      Exchange exchange;
      exchange.tokens = T;
      std::vector<int64_t> tokens;
      for (int64_t w = 0; w < members; ++w) {
        const size_t before = tokens.size();
        for (int64_t t = 0; t < T; ++t)
          if (ids[t].div(each, "floor").eq(w).logical_and(ids[t] >= 0).any().item<bool>()) tokens.push_back(t);
        exchange.sent_W.push_back(int64_t(tokens.size() - before));
      }
      EXPECT_TRUE(at::equal(got.counts_W2.select(1, 0), at::tensor(exchange.sent_W)));
      for (int64_t w = 0; w < members; ++w)
        EXPECT_EQ(got.counts_W2[w][1].item<int64_t>(),
                  ids.div(each, "floor").eq(w).logical_and(ids >= 0).sum().item<int64_t>());
      exchange.token_of_row_S = got.token_of_row.narrow(0, 0, int64_t(tokens.size()));
      EXPECT_TRUE(at::equal(exchange.token_of_row_S, at::tensor(tokens, at::kLong)));
      exchange.row_of_TW = got.row_of_TW;
      const at::Tensor rows = at::randn({int64_t(tokens.size()), 5}, g, at::kFloat);
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
        // Member by member, each sum rounded once.
        const at::ScalarType wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
        const at::Tensor want = at::zeros({T, 5}, wide);
        int64_t begin = 0;
        for (const int64_t count : exchange.sent_W) {
          want.index_add_(0, exchange.token_of_row_S.narrow(0, begin, count),
                          rows.to(dtype).narrow(0, begin, count).to(wide));
          begin += count;
        }
        EXPECT_TRUE(at::equal(exchange.sum(rows.to(dtype)), want.to(dtype))) << dtype;
      }
    }
  }
}

}  // namespace
}  // namespace moegraft::parallel
