#include "moegraft/model/stop_ids.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::model {

std::vector<int64_t> read_eos_ids(const std::filesystem::path& dir) {
  std::vector<int64_t> ids;
  for (const char* name : {"config.json", "generation_config.json"}) {
    const auto file = dir / name;
    if (dir.empty() || !std::filesystem::exists(file)) continue;
    const io::Json config = io::read_json(file);
    if (!config.is_object() || !config.contains("eos_token_id") || config.at("eos_token_id").is_null()) continue;
    const io::Json& value = config.at("eos_token_id");
    for (const io::Json& id : value.is_array() ? value : io::Json::array({value})) {
      MOEGRAFT_CHECK(id.is_number_integer(), file.string(), ": eos_token_id must be an integer or a list of them, got ",
                     value.type_name());
      if (std::find(ids.begin(), ids.end(), id.get<int64_t>()) == ids.end()) ids.push_back(id.get<int64_t>());
    }
  }
  return ids;
}

}  // namespace moegraft::model
