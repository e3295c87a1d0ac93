#include "exchange.h"

#include "libtorch.h"

#include <numeric>

#include "moegraft/base/check.h"

namespace moegraft::parallel {
namespace {

Wanted wanted_on_cpu(const at::Tensor& ids_TK, int64_t experts_each, int64_t members) {
  const at::Tensor ids = ids_TK.contiguous();
  const int64_t T = ids.size(0), K = ids.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> tokens(static_cast<size_t>(members));
  std::vector<int64_t> slots(static_cast<size_t>(members));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = id[t * K + k];
      if (e < 0) continue;
      ++slots[size_t(e / experts_each)];
      auto& list = tokens[size_t(e / experts_each)];
      if (list.empty() || list.back() != t) list.push_back(t);
    }
  Wanted out{at::empty({members, 2}, at::kLong), {}, at::full({T, members}, -1, at::kInt)};
  int64_t total = 0, *count = out.counts_W2.data_ptr<int64_t>();
  for (size_t w = 0; w < tokens.size(); ++w) {
    total += count[2 * w] = int64_t(tokens[w].size());
    count[2 * w + 1] = slots[w];
  }
  out.token_of_row = at::empty({total}, at::kLong);
  int64_t* token_of_row = out.token_of_row.data_ptr<int64_t>();
  int32_t *row_of = out.row_of_TW.data_ptr<int32_t>(), row = 0;
  for (size_t w = 0; w < tokens.size(); ++w)
    for (const int64_t t : tokens[w]) {
      token_of_row[row] = t;
      row_of[t * members + int64_t(w)] = row++;
    }
  return out;
}

}  // namespace

Wanted wanted_on_device(const at::Tensor& ids_TK, int64_t experts_each, int64_t members) {
  const int64_t T = ids_TK.size(0);
  const at::Tensor owner_TK =
      ids_TK.div(experts_each, "floor").masked_fill(ids_TK < 0, members);  // the last line takes what goes nowhere
  const at::Tensor wants_WT =
      at::zeros({T, members + 1}, ids_TK.options()).scatter(1, owner_TK, 1).t().narrow(0, 0, members).contiguous();
  const at::Tensor flat = wants_WT.view({-1});
  const at::Tensor counted = flat.cumsum(0) - 1, row = counted.masked_fill(flat == 0, members * T);
  const at::Tensor token = at::arange(T, ids_TK.options()).repeat({members});
  const at::Tensor slots_W = at::zeros({members + 1}, ids_TK.options())
                                 .scatter_add(0, owner_TK.reshape({-1}), at::ones({owner_TK.numel()}, ids_TK.options()))
                                 .narrow(0, 0, members);
  return {at::stack({wants_WT.sum(1), slots_W}, 1),
          at::empty({members * T + 1}, ids_TK.options()).scatter(0, row, token),
          counted.masked_fill(flat == 0, -1).view({members, T}).t().to(at::kInt).contiguous()};
}

at::Tensor Exchange::Travelling::wait() {
  pending.wait();
  from = at::Tensor();
  return to;
}

Exchange::Travelling Exchange::there(at::Tensor rows_SX, const std::string& what) const {
  std::vector<int64_t> shape = rows_SX.sizes().vec();
  shape[0] = num_received;
  Travelling t{rows_SX.contiguous(), at::empty(shape, rows_SX.options()), {}};
  t.pending = group->all_to_all(t.to, t.from, received_W, sent_W, what);
  return t;
}

Exchange::Travelling Exchange::back(at::Tensor rows_XX, const std::string& what) const {
  std::vector<int64_t> shape = rows_XX.sizes().vec();
  MOEGRAFT_INVARIANT(shape[0] == num_received, "Exchange: ", shape[0], " rows to send back, ", num_received, " came");
  shape[0] = num_sent();
  Travelling t{rows_XX.contiguous(), at::empty(shape, rows_XX.options()), {}};
  t.pending = group->all_to_all(t.to, t.from, sent_W, received_W, what);
  return t;
}

Exchange make_exchange(std::shared_ptr<distributed::Communicator> group, const at::Tensor& ids_TK, int64_t experts_each,
                       int64_t must_agree) {
  const int64_t W = group->size();
  const Wanted wanted =
      ids_TK.is_cpu() ? wanted_on_cpu(ids_TK, experts_each, W) : wanted_on_device(ids_TK, experts_each, W);
  const at::Tensor mine_W3 = at::cat({wanted.counts_W2, at::full({W, 1}, must_agree, ids_TK.options())}, 1);
  at::Tensor theirs_W3 = at::empty_like(mine_W3);
  const std::vector<int64_t> one_each(size_t(W), 1);
  group->all_to_all(theirs_W3, mine_W3, one_each, one_each, "numbers of tokens for the experts").wait();
  // The only wait for the device, and it stays: a collective's counts are the host's, the router has only just made
  // them, and nothing is left to launch meanwhile whose size does not hang on them. Buffers of a fixed size would do
  // without, but send and compute members x tokens rows.
  const at::Tensor host = at::stack({mine_W3, theirs_W3}).to(at::kCPU).contiguous();
  const int64_t *sent = host.const_data_ptr<int64_t>(), *received = sent + 3 * W;
  Exchange x;
  x.group = std::move(group);
  x.tokens = ids_TK.size(0);
  for (int64_t w = 0; w < W; ++w) {
    x.sent_W.push_back(sent[3 * w]);
    x.received_W.push_back(received[3 * w]);
    x.num_received += received[3 * w];
    x.num_slots += received[3 * w + 1];
    MOEGRAFT_INVARIANT(received[3 * w + 2] == must_agree, "dispatch: member ", w,
                       " of the expert group has another top_k, number of experts or number of groups (",
                       received[3 * w + 2], ", here ", must_agree, ")");
  }
  x.row_of_TW = wanted.row_of_TW;
  x.token_of_row_S = wanted.token_of_row.narrow(0, 0, std::accumulate(x.sent_W.begin(), x.sent_W.end(), int64_t{0}));
  return x;
}

}  // namespace moegraft::parallel
