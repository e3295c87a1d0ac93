#pragma once
// Small helpers of the data tests.

#include <torch/types.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

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
inline std::vector<int64_t> values(const at::Tensor& tensor) { return {tensor.const_data_ptr<int64_t>(), tensor.const_data_ptr<int64_t>() + tensor.numel()}; }

inline void write_shards(const std::filesystem::path& folder, const Schema& schema, const std::vector<Lists>& documents, int64_t max_tokens = 1 << 20) {
  ShardWriter writer(folder, schema, true, max_tokens);
  for (const auto& document : documents) writer.add(to_segments(document));
  writer.finish();
}

}  // namespace moegraft::data::test
