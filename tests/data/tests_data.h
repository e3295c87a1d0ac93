#pragma once
// Small helpers of the data tests.

#include <torch/types.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/data/shard.h"

namespace moegraft::data::test {

class Folder {
 public:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "moegraft-data-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const UserError& e) { return e.what(); }
  return "";
}
inline void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

// (modality, ids) runs by value.
using Lists = std::vector<std::pair<int64_t, std::vector<int32_t>>>;

inline Lists to_lists(const std::vector<Segment>& segments) {
  Lists out;
  for (const auto& segment : segments) out.push_back({segment.modality, {segment.ids.begin(), segment.ids.end()}});
  return out;
}
inline std::vector<Segment> to_segments(const Lists& lists) {
  std::vector<Segment> out;
  for (const auto& [modality, ids] : lists) out.push_back({modality, ids});
  return out;
}
inline std::vector<int64_t> values(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<int64_t>(), tensor.const_data_ptr<int64_t>() + tensor.numel()};
}

inline void write_shards(const std::filesystem::path& folder, const Schema& schema, const std::vector<Lists>& documents,
                         int64_t max_tokens = 1 << 20) {
  ShardWriter writer(folder, schema, true, max_tokens);
  for (const auto& document : documents) writer.add(to_segments(document));
  writer.finish();
}

}  // namespace moegraft::data::test
