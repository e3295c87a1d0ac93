// Linked where CUDA is off, or nccl.h was not there to compile nccl.cpp with.

#include "moegraft/base/check.h"
#include "nccl.h"

namespace moegraft::distributed {

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>&, int, int, std::chrono::milliseconds,
                                            const std::string&, at::Device) {
  fail<UserError>(
      "a run on several GPUs needs NCCL, which this build has none of: configure it with -DMOEGRAFT_CUDA=ON and nccl.h "
      "(tools/setup.sh --cuda, or -DMOEGRAFT_NCCL_INCLUDE=FOLDER with the "
      "wheel nvidia-nccl-cu13 unzipped), or take model.device: cpu");
}

}  // namespace moegraft::distributed
