#include "moegraft/adapters/sites.h"

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::adapters {
namespace {

using model::Site;

struct SiteName {
  Site site;
  const char* name;
};
constexpr SiteName kSites[] = {{Site::q, "q"},       {Site::k, "k"},   {Site::v, "v"},       {Site::o, "o"},
                               {Site::gate, "gate"}, {Site::up, "up"}, {Site::down, "down"}, {Site::router, "router"}};

}  // namespace

Site parse_site(const std::string& name) {
  for (const auto& row : kSites)
    if (name == row.name) return row.site;
  fail<UsageError>("adapters: '", name, "' is not a site; sites: ", join(known_sites(), ", "));
}

const char* site_name(Site site) {
  for (const auto& row : kSites)
    if (row.site == site) return row.name;
  return "?";
}

std::vector<std::string> known_sites() {
  std::vector<std::string> names;
  for (const auto& row : kSites) names.emplace_back(row.name);
  return names;
}

bool is_ffn_site(Site site) { return site == Site::gate || site == Site::up || site == Site::down; }

bool is_per_expert(const model::DecoderSpec& spec, Site site) { return is_ffn_site(site) && spec.has_experts(); }

bool has_site(const model::DecoderSpec& spec, int64_t layer, Site site) {
  return is_per_expert(spec, site) || site == Site::router ? spec.layers[size_t(layer)].sparse : true;
}

SiteShape site_shape(const model::DecoderSpec& s, Site site) {
  const int64_t q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim,
                ffn = s.has_experts() ? s.moe_intermediate_size : s.intermediate_size;
  switch (site) {
    case Site::q: return {s.hidden_size, q};
    case Site::k:
    case Site::v: return {s.hidden_size, kv};
    case Site::o: return {q, s.hidden_size};
    case Site::gate:
    case Site::up: return {s.hidden_size, ffn};
    case Site::down: return {ffn, s.hidden_size};
    case Site::router: return {s.hidden_size, s.num_experts};
  }
  return {};
}

}  // namespace moegraft::adapters
