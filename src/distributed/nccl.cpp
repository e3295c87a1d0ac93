#ifdef MOEGRAFT_HAVE_CUDA
#define USE_C10D_NCCL  // LibTorch's build has it; its headers hide the class without this
#include "nccl.h"

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "moegraft/base/check.h"

namespace moegraft::distributed {

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout, const std::string& name,
                                            at::Device device) {
  MOEGRAFT_INVARIANT(device.has_index(), "a group on ", device, " needs the GPU's number");
  auto options = c10d::ProcessGroupNCCL::Options::create();
  // Ours (watch.h) speaks first; this one is for a process that hangs so badly that ours cannot.
  options->timeout = timeout + std::chrono::seconds(60);
  options->group_name = name;
  auto group = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, options);
  group->setGroupUid(name);
  group->setBoundDeviceId(device);
  return group;
}

}  // namespace moegraft::distributed
#endif  // MOEGRAFT_HAVE_CUDA
