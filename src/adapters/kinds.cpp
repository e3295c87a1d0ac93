// The table of kinds: how each is made, and what it trains, by shape.
#include <algorithm>

#include "moegraft/adapters/modality_lora.h"
#include "moegraft/adapters/vera.h"
#include "moegraft/base/check.h"

namespace moegraft::adapters {
namespace {

struct Kind {
  AdapterKind kind;
  std::shared_ptr<Adapter> (*make)(const AdapterContext&);
  std::vector<int64_t> (*trained_sizes)(int64_t rank, const SiteShape& site);
  bool makes_factors;
};

template <class T>
std::shared_ptr<Adapter> make(const AdapterContext& context) {
  return std::make_shared<T>(context);
}

const Kind kKinds[] = {
    {AdapterKind::modality_lora, make<ModalityLora>,
     [](int64_t rank, const SiteShape& s) { return std::vector{rank * s.in, s.out * rank}; }, false},
    {AdapterKind::vera, make<Vera>, [](int64_t rank, const SiteShape& s) { return std::vector{rank, s.out}; }, true},
};

const Kind& find(AdapterKind kind) {
  const auto* found =
      std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& row) { return row.kind == kind; });
  MOEGRAFT_INVARIANT(found != std::end(kKinds), "adapters/kinds.cpp has no row for ", config::name_of(kind));
  return *found;
}

}  // namespace

std::shared_ptr<Adapter> make_adapter(const AdapterContext& context) { return find(context.config.kind).make(context); }
std::vector<int64_t> trained_sizes(AdapterKind kind, int64_t rank, const SiteShape& site) {
  return find(kind).trained_sizes(rank, site);
}
bool makes_factors(AdapterKind kind) { return find(kind).makes_factors; }

}  // namespace moegraft::adapters
