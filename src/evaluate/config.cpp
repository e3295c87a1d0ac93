#include "moegraft/evaluate/config.h"

#include <algorithm>
#include <set>

namespace moegraft::evaluate {
namespace {

template <class Section>
void check_names(const std::vector<Section>& sections, const char* key) {
  std::set<std::string> seen;
  for (size_t i = 0; i < sections.size(); ++i) {
    MOEGRAFT_CHECK_USAGE(!sections[i].name.empty(), key, "[", i, "].name must not be empty");
    MOEGRAFT_CHECK_USAGE(seen.insert(sections[i].name).second, key, "[", i, "].name must differ from the others, got ",
                         sections[i].name, " again");
  }
}

}  // namespace

void EvalConfig::validate(const std::string&) const {
  check_names(images, "images");
  check_names(codec, "codec");
  check_names(retrieval, "retrieval");
  check_names(ranking, "ranking");
  if (text) MOEGRAFT_CHECK_USAGE(!text->shards.empty(), "text.shards must name at least one shard or folder");
  if (drift) {
    MOEGRAFT_CHECK_USAGE(!drift->dtypes.empty(), "drift.dtypes must name at least one of float32, bfloat16");
    for (const auto& name : drift->dtypes)
      MOEGRAFT_CHECK_USAGE(name == "float32" || name == "bfloat16",
                           "drift.dtypes must be among float32, bfloat16, got ", name);
  }
  MOEGRAFT_CHECK_USAGE(!baselines || !retrieval.empty(),
                       "baselines are measured on the prompts and pictures of `retrieval`: give that too");
  MOEGRAFT_CHECK_USAGE(!routing || (text && !images.empty()),
                       "routing compares text with pictures: give `text` and `images` too");
}

}  // namespace moegraft::evaluate
