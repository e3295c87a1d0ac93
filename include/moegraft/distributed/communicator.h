#pragma once
// One group of processes and what they say to each other. CPU tensors go through Gloo, CUDA tensors through NCCL.

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace moegraft::distributed {

// A collective under way. Its tensors must not be touched before wait(); destroying it waits. On CUDA wait() lets the
// current stream wait, not the host. UserError when it failed or took longer than the group's timeout: names this rank,
// the collective, the group, and the ranks that were seen least recently.
class Pending {
 public:
  Pending();
  Pending(Pending&&) noexcept;
  Pending& operator=(Pending&&) noexcept;
  ~Pending();
  void wait();

 private:
  friend class Communicator;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct Traffic {
  int64_t calls = 0, bytes = 0;  // handed to collectives by this process
  double wait_seconds = 0;       // the host's time in wait() (on CUDA: next to nothing)

  Traffic& operator+=(const Traffic& more) {
    calls += more.calls, bytes += more.bytes, wait_seconds += more.wait_seconds;
    return *this;
  }
};

// Every member calls the same collectives in the same order. `what` says in errors and logs what the tensor is
// ("gradients, bucket 3"). A group of one process needs no backend: every collective is a copy or nothing. Tensors are
// dense; sums in the tensor's dtype, in an order fixed by the group's layout.
class Communicator {
 public:
  virtual ~Communicator();
  int64_t rank() const { return rank_; }  // in this group
  int64_t size() const { return static_cast<int64_t>(ranks_.size()); }
  const std::vector<int64_t>& ranks() const { return ranks_; }  // of the world
  const std::string& name() const { return name_; }             // "world", "expert", …

  Pending all_reduce(at::Tensor& sum, const std::string& what);  // in place
  Pending all_reduce_min(at::Tensor& least, const std::string& what);
  Pending broadcast(at::Tensor& tensor, int64_t root, const std::string& what);
  // out [size * n, …] = the members' in [n, …] in rank order.
  Pending all_gather(at::Tensor& out, const at::Tensor& in, const std::string& what);
  // in's rows, in_rows[r] of them for member r in order; out's come from member r, out_rows[r] of them. Any dtype
  // (moved as bytes).
  Pending all_to_all(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& out_rows,
                     const std::vector<int64_t>& in_rows, const std::string& what);
  // Host-side, blocking, small: always through Gloo.
  std::vector<std::string> all_gather_text(const std::string& mine, const std::string& what);
  std::vector<std::vector<double>> all_gather_numbers(const std::vector<double>& mine,
                                                      const std::string& what);  // as many of each member
  void barrier(const std::string& what);

  Traffic take_traffic();  // since the last call

 protected:
  friend class World;
  struct Backends;
  Communicator(std::string name, std::vector<int64_t> ranks, int64_t rank, std::unique_ptr<Backends> backends);
  bool has_backend() const;
  Pending reduce(const char* operation, at::Tensor& tensor, const std::string& what, bool least);
  template <class Start>
  Pending start(const char* operation, const std::string& what, int64_t bytes, std::vector<at::Tensor> tensors,
                const Start& start);
  std::string name_;
  std::vector<int64_t> ranks_;
  int64_t rank_ = 0;
  std::unique_ptr<Backends> backends_;
};

}  // namespace moegraft::distributed
