#include "moegraft/io/picture.h"

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

std::string Picture::read() const {
  MOEGRAFT_INVARIANT(!empty(), "there is no picture to read");
  return store_ ? store_->read(index_) : read_file(file_);
}

}  // namespace moegraft::io
