#include "moegraft/distributed/communicator.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "shared.h"
#include "watch.h"

namespace moegraft::distributed {
namespace {

// The first line of a backend's error, without the stack that some append and the source position in front.
std::string first_line(const std::string& text) {
  std::string line = text.substr(0, text.find('\n'));
  if (line.starts_with('[')) {
    const auto end = line.find("] ");
    if (end != std::string::npos) line = line.substr(end + 2);
  }
  return line;
}

at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.detach().view({-1}).view(at::kByte); }

}  // namespace

struct Pending::Impl {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Group> group;
  std::string operation;  // all_reduce of "gradients, bucket 3"
  int64_t call = 0;
  bool on_gpu = false;
  Clock::time_point begin = Clock::now();
  std::vector<at::Tensor> keep;

  [[noreturn]] void fail_with(const std::exception& e) const {
    throw UserError(explain_failure(*group, operation, call, seconds_since(begin), first_line(e.what())));
  }
  void wait() {
    const auto start = Clock::now();
    const auto count = [&] {
      const std::lock_guard lock(group->mutex);
      group->traffic.wait_seconds += seconds_since(start);
    };
    try {
      wait_for_work();
    } catch (const std::exception& e) {
      count();
      fail_with(e);
    }
    count();
  }
  // A member whose neighbours are alive would not notice a death elsewhere before its own timeout: it looks in the
  // store now and then.
  void wait_for_work() {
    if (on_gpu) {
      work->wait();
      return;
    }
    while (true) {
      try {
        work->wait(kLookPause);
        return;
      } catch (const std::exception&) {
        if (work->isCompleted()) {  // in the moment after this look, perhaps: then all is well
          work->wait();
          return;
        }
        if (group->shared->trouble()) throw std::runtime_error("stopped after another rank's trouble");
      }
    }
  }
};

Pending::Pending() = default;
Pending::Pending(Pending&&) noexcept = default;
Pending& Pending::operator=(Pending&& other) noexcept {
  if (this != &other) {
    this->~Pending();
    new (this) Pending(std::move(other));
  }
  return *this;
}

Pending::~Pending() {
  if (!impl_) return;
  if (impl_->group->failed) return;
  try {
    impl_->wait_for_work();
  } catch (
      const std::exception&) {  // nobody asked for the result; the next collective of the group fails too and says why
  }
}

void Pending::wait() {
  if (!impl_) return;
  const auto impl = std::move(impl_);
  impl->wait();
}

Communicator::~Communicator() = default;

Communicator::Communicator(std::string name, std::vector<int64_t> ranks, int64_t rank,
                           std::unique_ptr<Backends> backends)
    : name_(std::move(name)), ranks_(std::move(ranks)), rank_(rank), backends_(std::move(backends)) {}

template <class Start>
Pending Communicator::start(const char* operation, const std::string& what, int64_t bytes,
                            std::vector<at::Tensor> tensors, const Start& start) {
  const auto& group = backends_->group;
  {
    const std::lock_guard lock(group->mutex);
    ++group->traffic.calls;
    group->traffic.bytes += bytes;
  }
  const bool cuda = tensors.front().is_cuda();
  const auto& backend = cuda ? group->nccl : group->gloo;
  MOEGRAFT_INVARIANT(backend, operation, " of \"", what, "\": group ", name_, " has no backend for ",
                     tensors.front().device());
  Pending pending;
  pending.impl_ = std::make_unique<Pending::Impl>();
  auto& impl = *pending.impl_;
  impl.group = group;
  impl.operation = detail::concat(operation, " of \"", what, '"');
  impl.call = group->calls++;
  impl.on_gpu = cuda;
  impl.keep = std::move(tensors);
  try {
    impl.work = start(*backend);
  } catch (const std::exception& e) {
    const auto failed = std::move(pending.impl_);
    failed->fail_with(e);
  }
  if (cuda && group->shared->watch) {
    // The watch belongs to what it is given here: no cycle of owners.
    group->shared->watch->add(impl.work, [group = std::weak_ptr<Group>(group), operation = impl.operation,
                                          call = impl.call](double seconds, const std::string& cause) {
      const auto alive = group.lock();
      return alive ? explain_failure(*alive, operation, call, seconds, first_line(cause))
                   : operation + " failed: " + first_line(cause);
    });
  }
  return pending;
}

Pending Communicator::reduce(const char* operation, at::Tensor& tensor, const std::string& what, bool least) {
  MOEGRAFT_INVARIANT(tensor.is_contiguous(), operation, " of \"", what, "\": the tensor is not contiguous");
  if (!has_backend() || tensor.numel() == 0) return {};
  std::vector<at::Tensor> tensors = {tensor.detach().view({-1})};
  c10d::AllreduceOptions options;
  options.reduceOp = least ? c10d::ReduceOp::MIN : c10d::ReduceOp::SUM;
  return start(operation, what, static_cast<int64_t>(tensor.nbytes()), tensors,
               [&](c10d::Backend& b) { return b.allreduce(tensors, options); });
}

Pending Communicator::all_reduce(at::Tensor& sum, const std::string& what) {
  return reduce("all_reduce", sum, what, false);
}
Pending Communicator::all_reduce_min(at::Tensor& least, const std::string& what) {
  return reduce("all_reduce_min", least, what, true);
}

Pending Communicator::broadcast(at::Tensor& tensor, int64_t root, const std::string& what) {
  MOEGRAFT_INVARIANT(tensor.is_contiguous(), "broadcast of \"", what, "\": the tensor is not contiguous");
  MOEGRAFT_INVARIANT(root >= 0 && root < size(), "broadcast of \"", what, "\": root ", root, " is not in group ", name_,
                     " of ", size());
  if (!has_backend() || tensor.numel() == 0) return {};
  std::vector<at::Tensor> tensors = {as_bytes(tensor)};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  return start("broadcast", what, static_cast<int64_t>(tensor.nbytes()), tensors,
               [&](c10d::Backend& b) { return b.broadcast(tensors, options); });
}

Pending Communicator::all_gather(at::Tensor& out, const at::Tensor& in, const std::string& what) {
  MOEGRAFT_INVARIANT(out.is_contiguous() && in.is_contiguous(), "all_gather of \"", what,
                     "\": a tensor is not contiguous");
  MOEGRAFT_INVARIANT(out.scalar_type() == in.scalar_type() && out.numel() == in.numel() * size(), "all_gather of \"",
                     what, "\": ", out.sizes(), " cannot take ", size(), " times ", in.sizes());
  if (in.numel() == 0) return {};
  if (!has_backend()) {
    out.view({-1}).copy_(in.view({-1}));
    return {};
  }
  at::Tensor to = as_bytes(out), from = as_bytes(in);
  return start("all_gather", what, static_cast<int64_t>(in.nbytes()), {to, from},
               [&](c10d::Backend& b) { return b._allgather_base(to, from); });
}

Pending Communicator::all_to_all(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& out_rows,
                                 const std::vector<int64_t>& in_rows, const std::string& what) {
  const auto check = [&](const at::Tensor& t, const std::vector<int64_t>& rows, const char* side) {
    int64_t sum = 0;
    bool negative = false;
    for (const int64_t n : rows) sum += n, negative = negative || n < 0;
    MOEGRAFT_INVARIANT(t.is_contiguous() && t.dim() >= 1, "all_to_all of \"", what, "\": ", side,
                       " is not contiguous rows");
    MOEGRAFT_INVARIANT(static_cast<int64_t>(rows.size()) == size() && !negative && sum == t.size(0), "all_to_all of \"",
                       what, "\": ", side, " has ", t.size(0), " rows, the counts of ", size(), " members are ", rows);
  };
  check(out, out_rows, "out");
  check(in, in_rows, "in");
  const auto row_bytes = [](const at::Tensor& t) {
    auto bytes = static_cast<int64_t>(t.element_size());
    for (const int64_t n : t.sizes().slice(1)) bytes *= n;
    return bytes;
  };
  const int64_t bytes = row_bytes(in);
  MOEGRAFT_INVARIANT(out.scalar_type() == in.scalar_type() && row_bytes(out) == bytes, "all_to_all of \"", what,
                     "\": rows of ", out.sizes(), " and ", in.sizes(), " differ");
  if (bytes == 0) return {};
  if (!has_backend()) {
    out.view({-1}).copy_(in.view({-1}));
    return {};
  }
  std::vector<int64_t> out_bytes(out_rows), in_bytes(in_rows);
  for (int64_t& n : out_bytes) n *= bytes;
  for (int64_t& n : in_bytes) n *= bytes;
  at::Tensor to = as_bytes(out), from = as_bytes(in);
  return start("all_to_all", what, static_cast<int64_t>(in.nbytes()), {to, from},
               [&](c10d::Backend& b) { return b.alltoall_base(to, from, out_bytes, in_bytes); });
}

std::vector<std::vector<double>> Communicator::all_gather_numbers(const std::vector<double>& mine,
                                                                  const std::string& what) {
  const at::Tensor in = at::tensor(mine, at::kDouble);
  at::Tensor out = at::empty({size() * in.numel()}, at::kDouble);
  all_gather(out, in, what).wait();
  std::vector<std::vector<double>> all;
  const double* at = out.const_data_ptr<double>();
  for (int64_t r = 0; r < size(); ++r, at += mine.size()) all.emplace_back(at, at + mine.size());
  return all;
}

std::vector<std::string> Communicator::all_gather_text(const std::string& mine, const std::string& what) {
  if (!has_backend()) return {mine};
  at::Tensor length = at::full({1}, static_cast<int64_t>(mine.size()), at::kLong),
             lengths = at::empty({size()}, at::kLong);
  all_gather(lengths, length, what).wait();
  const int64_t longest = std::max<int64_t>(lengths.max().item<int64_t>(), 1);
  at::Tensor text = at::zeros({longest}, at::kByte), texts = at::empty({size(), longest}, at::kByte);
  if (!mine.empty()) std::memcpy(text.data_ptr(), mine.data(), mine.size());
  all_gather(texts, text, what).wait();
  std::vector<std::string> all;
  for (int64_t r = 0; r < size(); ++r) {
    all.emplace_back(static_cast<const char*>(texts.data_ptr()) + r * longest,
                     static_cast<size_t>(lengths[r].item<int64_t>()));
  }
  return all;
}

void Communicator::barrier(const std::string& what) {
  if (!has_backend()) return;
  at::Tensor here = at::ones({1}, at::kInt);
  start("barrier", what, 0, {here}, [&](c10d::Backend& b) {
    std::vector<at::Tensor> tensors = {here};
    return b.allreduce(tensors, c10d::AllreduceOptions());
  }).wait();
}

Traffic Communicator::take_traffic() {
  const std::lock_guard lock(backends_->group->mutex);
  return std::exchange(backends_->group->traffic, Traffic{});
}

bool Communicator::has_backend() const { return backends_->group->gloo || backends_->group->nccl; }

}  // namespace moegraft::distributed
