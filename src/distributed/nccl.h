#pragma once
// NCCL, in a build with CUDA (nccl_stub.cpp otherwise).

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace moegraft::distributed {

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout, const std::string& name,
                                            at::Device device);

}  // namespace moegraft::distributed
