#pragma once
// Rows that go to the members of a group and come back.

#include <torch/types.h>

#include <memory>
#include <string>
#include <vector>

#include "moegraft/distributed/communicator.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::parallel {

// One dispatch: S rows leave, ordered by (destination, token); X rows arrive, ordered by (source, the source's token).
struct Exchange {
  std::shared_ptr<distributed::Communicator> group;
  int64_t tokens = 0;                       // T
  at::Tensor token_of_row_S;                // int64
  at::Tensor row_of_TW;                     // int32: a token's row for each member; -1: none
  std::vector<int64_t> sent_W, received_W;  // rows per member
  int64_t num_received = 0;                 // X
  int64_t num_slots = 0;                    // of the rows that arrive: those whose expert is here, R

  int64_t num_sent() const { return token_of_row_S.size(0); }

  // A tensor under way. Its buffers live until wait().
  struct Travelling {
    at::Tensor from, to;
    distributed::Pending pending;
    at::Tensor wait();
  };
  Travelling there(at::Tensor rows_SX, const std::string& what) const;
  Travelling back(at::Tensor rows_XX, const std::string& what) const;

  at::Tensor gather(const at::Tensor& of_TX) const { return of_TX.index_select(0, token_of_row_S); }  // -> [S, …]
  // y[t] = the sum of token t's rows, in the order of the members; float32 inside. [S, N] -> [T, N].
  at::Tensor sum(const at::Tensor& rows_SN) const { return kernels::sum_rows(rows_SN, row_of_TW); }
};

// What is to be sent, as the device finds it, apart for tests: tensor operations that wait for nothing and depend on no
// order.
struct Wanted {
  at::Tensor counts_W2;     // int64: tokens that have an expert at member w, and how many slots they have there
  at::Tensor token_of_row;  // int64, by (member, token); may be longer than the counts' sum
  at::Tensor row_of_TW;     // int32
};
Wanted wanted_on_device(const at::Tensor& ids_TK, int64_t experts_each, int64_t members);

// ids_TK int64 in [-1, E); member w holds the experts [w*experts_each, (w+1)*experts_each). Collective; checks that the
// members agree on `must_agree`.
Exchange make_exchange(std::shared_ptr<distributed::Communicator> group, const at::Tensor& ids_TK, int64_t experts_each,
                       int64_t must_agree);

}  // namespace moegraft::parallel
