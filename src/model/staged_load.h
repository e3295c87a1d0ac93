#pragma once
// Weights on their way from files to a device, through page-locked buffers.

#include <string>
#include <vector>

#include "moegraft/io/read_ahead.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {

// Tensors are named first and brought all at once, so that files are read from front to back and what is wrong with any
// of them shows before.
class StagedLoad {
 public:
  StagedLoad(at::Device device, Staging staging) : device_(device), staging_(staging) {}

  // `from` holds numbers of dtype `type`, as many as `to` has elements. to: contiguous, on the device, of any floating
  // dtype.
  void add(io::FileRange from, at::ScalarType type, at::Tensor to);
  // Returns when all is there. UserError: a file that cannot be read. title: of the progress bar (bytes, rate, time
  // left) that large loads show; empty: none.
  void run(const std::string& title);

 private:
  void copy(const io::ReadPiece& piece) const;

  at::Device device_;
  Staging staging_;
  std::vector<io::FileRange> from_;
  std::vector<at::ScalarType> types_;
  std::vector<at::Tensor> to_;
};

}  // namespace moegraft::model
