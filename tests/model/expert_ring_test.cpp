// Which layers a ring of buffers fetches, and where to.
#include "moegraft/model/expert_ring.h"

#include "libtorch.h"

#include <gtest/gtest.h>

#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

TEST(RingOrder, SparesWhatIsStillToBeAskedFor) {
  RingOrder ring;
  EXPECT_EQ(ring.find(0), -1);
  EXPECT_THROW(ring.use(0), InvariantError);
  const auto first = ring.prefetch(0), second = ring.prefetch(1), again = ring.prefetch(0);
  EXPECT_TRUE(first.fetch && second.fetch && !again.fetch);
  EXPECT_TRUE(first.slot != second.slot && again.slot == first.slot);
  EXPECT_EQ(ring.use(1), second.slot);
  const auto third = ring.prefetch(2);
  EXPECT_TRUE(third.fetch && !third.under_way);
  EXPECT_EQ(third.slot, second.slot) << "nobody has asked for layer 0 yet";
  EXPECT_TRUE(ring.prefetch(3).under_way) << "both layers are awaited";
}

TEST(RingOrder, ForwardAndBackwardFetchEachLayerOnceButTheLastTwo) {
  constexpr int64_t L = 6;
  RingOrder ring;
  const auto step = [&] {
    int64_t fetched = 0;
    const auto visit = [&](int64_t l, int64_t next) {
      for (const int64_t wanted : {next, l})
        if (wanted >= 0 && wanted < L) fetched += ring.prefetch(wanted).fetch;
      ring.use(l);
    };
    for (int64_t l = 0; l < L; ++l) visit(l, l + 1);
    for (int64_t l = L; l-- > 0;) visit(l, l - 1);
    return fetched;
  };
  EXPECT_EQ(step(), L + L - 2);
  EXPECT_EQ(step(), 2 * (L - 2)) << "a step begins where the last one ended";
}

}  // namespace
}  // namespace moegraft::model
