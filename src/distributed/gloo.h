#pragma once
// Makers of c10d backends. Each backend's header is read by one file only: Gloo's and NCCL's own headers stay out of
// the rest.

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace moegraft::distributed {

// The address that others reach this machine by: of GLOO_SOCKET_IFNAME where it is set, else the one that packets to
// the master leave from.
struct GlooAddress {
  std::string master;
  int64_t master_port = 0;
  bool one_machine = true;
};

// Collective over the members: connects all pairs through the store.
c10::intrusive_ptr<c10d::Backend> make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout, const GlooAddress& address);

}  // namespace moegraft::distributed
