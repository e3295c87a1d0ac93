// Linked where CUDA is off.

#include "moegraft/base/check.h"
#include "nccl.h"

namespace moegraft::distributed {

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>&, int, int, std::chrono::milliseconds, const std::string&, at::Device) {
  fail<UserError>("a run on several GPUs needs a build with -DMOEGRAFT_CUDA=ON (NCCL); this one has none: rebuild, or take model.device: cpu");
}

}  // namespace moegraft::distributed
