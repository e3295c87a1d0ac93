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
  Wanted out{at::empty({members, 2}, at::kLong), {}};
  int64_t total = 0, *count = out.counts_W2.data_ptr<int64_t>();
  for (size_t w = 0; w < tokens.size(); ++w) {
    total += count[2 * w] = int64_t(tokens[w].size());
    count[2 * w + 1] = slots[w];
  }
  out.token_of_row = at::empty({total}, at::kLong);
  int64_t* next = out.token_of_row.data_ptr<int64_t>();
  for (const auto& list : tokens) next = std::copy(list.begin(), list.end(), next);
  return out;
}

template <class scalar>
void sum_rows(const at::Tensor& rows_SN, const at::Tensor& token_of_row_S, const std::vector<int64_t>& sent_W, const at::Tensor& out_TN) {
  const int64_t T = out_TN.size(0), N = out_TN.size(1), W = int64_t(sent_W.size());
  using wide = std::conditional_t<std::is_same_v<scalar, double>, double, float>;
  std::vector<int64_t> row_of(size_t(T * W), -1);
  const int64_t* token = token_of_row_S.const_data_ptr<int64_t>();
  for (int64_t w = 0, row = 0; w < W; ++w)
    for (int64_t i = 0; i < sent_W[size_t(w)]; ++i, ++row) row_of[size_t(token[row] * W + w)] = row;
  const scalar* rows = rows_SN.const_data_ptr<scalar>();
  scalar* out = out_TN.data_ptr<scalar>();
  at::parallel_for(0, T, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(N, 1)), [&](int64_t begin, int64_t end) {
    std::vector<wide> sum(static_cast<size_t>(N));
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), wide(0));
      for (int64_t w = 0; w < W; ++w) {
        const int64_t row = row_of[size_t(t * W + w)];
        if (row < 0) continue;
        const scalar* from = rows + row * N;
        for (int64_t n = 0; n < N; ++n) sum[size_t(n)] += wide(from[n]);
      }
      for (int64_t n = 0; n < N; ++n) out[t * N + n] = scalar(sum[size_t(n)]);
    }
  });
}

}  // namespace

Wanted wanted_on_device(const at::Tensor& ids_TK, int64_t experts_each, int64_t members) {
  const int64_t T = ids_TK.size(0);
  const at::Tensor owner_TK = ids_TK.div(experts_each, "floor").masked_fill(ids_TK < 0, members);  // the last line takes what goes nowhere
  const at::Tensor wants_WT = at::zeros({T, members + 1}, ids_TK.options()).scatter(1, owner_TK, 1).t().narrow(0, 0, members).contiguous();
  const at::Tensor flat = wants_WT.view({-1});
  const at::Tensor row = (flat.cumsum(0) - 1).masked_fill(flat == 0, members * T);
  const at::Tensor token = at::arange(T, ids_TK.options()).repeat({members});
  const at::Tensor slots_W = at::zeros({members + 1}, ids_TK.options()).scatter_add(0, owner_TK.reshape({-1}), at::ones({owner_TK.numel()}, ids_TK.options())).narrow(0, 0, members);
  return {at::stack({wants_WT.sum(1), slots_W}, 1), at::empty({members * T + 1}, ids_TK.options()).scatter(0, row, token)};
}

at::Tensor sum_on_device(const Exchange& exchange, const at::Tensor& rows_SN) {
  // A token occurs once per member, so each call's additions are to different rows: no order to depend on.
  const at::ScalarType wide = rows_SN.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor out_TN = at::zeros({exchange.tokens, rows_SN.size(1)}, rows_SN.options().dtype(wide));
  int64_t begin = 0;
  for (const int64_t count : exchange.sent_W) {
    if (count > 0) out_TN.index_add_(0, exchange.token_of_row_S.narrow(0, begin, count), rows_SN.narrow(0, begin, count).to(wide));
    begin += count;
  }
  return out_TN.to(rows_SN.scalar_type());
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

at::Tensor Exchange::sum(const at::Tensor& rows_SN) const {
  if (rows_SN.is_cpu()) {
    const at::Tensor out_TN = at::empty({tokens, rows_SN.size(1)}, rows_SN.options());
    switch (rows_SN.scalar_type()) {
      case at::kFloat: sum_rows<float>(rows_SN, token_of_row_S, sent_W, out_TN); break;
      case at::kDouble: sum_rows<double>(rows_SN, token_of_row_S, sent_W, out_TN); break;
      case at::kBFloat16: sum_rows<at::BFloat16>(rows_SN, token_of_row_S, sent_W, out_TN); break;
      default: MOEGRAFT_INVARIANT(rows_SN.scalar_type() == at::kHalf, "Exchange::sum of ", c10::toString(rows_SN.scalar_type())); sum_rows<at::Half>(rows_SN, token_of_row_S, sent_W, out_TN);
    }
    return out_TN;
  }
  return sum_on_device(*this, rows_SN);
}

Exchange make_exchange(std::shared_ptr<distributed::Communicator> group, const at::Tensor& ids_TK, int64_t experts_each, int64_t must_agree) {
  const int64_t W = group->size();
  const Wanted wanted = ids_TK.is_cpu() ? wanted_on_cpu(ids_TK, experts_each, W) : wanted_on_device(ids_TK, experts_each, W);
  const at::Tensor mine_W3 = at::cat({wanted.counts_W2, at::full({W, 1}, must_agree, ids_TK.options())}, 1);
  at::Tensor theirs_W3 = at::empty_like(mine_W3);
  const std::vector<int64_t> one_each(size_t(W), 1);
  group->all_to_all(theirs_W3, mine_W3, one_each, one_each, "numbers of tokens for the experts").wait();
  const at::Tensor host = at::stack({mine_W3, theirs_W3}).to(at::kCPU).contiguous();  // the only wait for the device
  const int64_t *sent = host.const_data_ptr<int64_t>(), *received = sent + 3 * W;
  Exchange x;
  x.group = std::move(group);
  x.tokens = ids_TK.size(0);
  for (int64_t w = 0; w < W; ++w) {
    x.sent_W.push_back(sent[3 * w]);
    x.received_W.push_back(received[3 * w]);
    x.num_received += received[3 * w];
    x.num_slots += received[3 * w + 1];
    MOEGRAFT_INVARIANT(received[3 * w + 2] == must_agree, "dispatch: member ", w, " of the expert group has another top_k, number of experts or number of groups (", received[3 * w + 2], ", here ", must_agree, ")");
  }
  x.token_of_row_S = wanted.token_of_row.narrow(0, 0, std::accumulate(x.sent_W.begin(), x.sent_W.end(), int64_t{0}));
  return x;
}

}  // namespace moegraft::parallel
