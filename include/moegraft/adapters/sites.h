#pragma once
// Names, shapes and presence of the places where adapters act (model/sites.h).

#include <string>
#include <vector>

#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"

namespace moegraft::adapters {

model::Site parse_site(const std::string& name);  // UsageError names the known ones
const char* site_name(model::Site site);
std::vector<std::string> known_sites();
bool is_ffn_site(model::Site site);  // gate, up, down
// Whether the site's factors are one pair for each expert. FFN sites of a dense model have one for the layer.
bool is_per_expert(const model::DecoderSpec& spec, model::Site site);
// Whether a layer has the site: attention's always, the FFN's in sparse layers, or in every layer of a dense model; the
// router's in sparse layers.
bool has_site(const model::DecoderSpec& spec, int64_t layer, model::Site site);

struct SiteShape {
  int64_t in = 0, out = 0;
};
SiteShape site_shape(const model::DecoderSpec& spec, model::Site site);

}  // namespace moegraft::adapters
