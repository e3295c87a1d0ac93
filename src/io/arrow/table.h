#pragma once
// Parquet and Arrow files behind one interface: batches of rows for a pass, single cells for pictures.

#include <arrow/api.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::io {

class OpenTable {
 public:
  // part: the row group or batch; first: of the batch's rows in it. A batch may lack columns: those without any text.
  using Take = std::function<void(int64_t part, int64_t first, const arrow::RecordBatch& batch)>;
  virtual ~OpenTable() = default;
  virtual const arrow::Schema& schema() const = 0;
  virtual void scan(const Take& take) = 0;
  // The array that holds the whole value of a column (its place in the schema) in a row of a part, and where. Cheap in
  // the order of rows.
  virtual std::pair<std::shared_ptr<arrow::Array>, int64_t> cell(int64_t part, int64_t row, int column) = 0;
};

using OpenFunction = std::unique_ptr<OpenTable> (*)(const std::filesystem::path& path);
std::unique_ptr<OpenTable> open_parquet(const std::filesystem::path& path);
std::unique_ptr<OpenTable> open_arrow(const std::filesystem::path& path);

// Arrow says what is wrong by Status or exception; here it is a line with the file's name.
[[noreturn]] inline void damaged(const std::filesystem::path& path, const std::string& why) {
  fail(path.string(), " cannot be read, it is damaged or cut short: ", shortened(why, 160), "; load it again");
}
inline void check(const arrow::Status& status, const std::filesystem::path& path) {
  if (!status.ok()) damaged(path, status.message());
}
template <class T>
T value_of(arrow::Result<T> result, const std::filesystem::path& path) {
  check(result.status(), path);
  return std::move(result).ValueUnsafe();
}
template <class F>
auto guarded(const std::filesystem::path& path, const F& f) {
  try {
    return f();
  } catch (const UserError&) { throw; } catch (const InvariantError&) {
    throw;
  } catch (const std::bad_alloc&) {
    fail(path.string(), ": a batch of its rows does not fit in memory");
  } catch (const std::exception& e) { damaged(path, e.what()); }
}

}  // namespace moegraft::io
