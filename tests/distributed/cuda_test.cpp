// NCCL with one process: every collective runs on it and leaves what it must. Several GPUs: the same bodies as on Gloo.
#include <gtest/gtest.h>

#include "distributed/nccl.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/distributed/world.h"
#include "support/gpu.h"

namespace moegraft::distributed {
namespace {

TEST(Nccl, EveryCollectiveOfOneProcess) {
  MOEGRAFT_NEEDS_GPU();
  const at::Device device(at::kCUDA, 0);
  auto world = World::join({}, {.device = device, .timeout = std::chrono::seconds(60), .backend_for_one = true});
  auto& all = world->all();
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kLong}) {
    const at::Tensor ramp = (at::arange(1001, at::device(device)) % 16).to(dtype);
    at::Tensor t = ramp.clone(), out = at::empty_like(t);
    all.all_reduce(t, "t").wait();
    EXPECT_TRUE(at::equal(t, ramp));
    all.all_reduce_min(t, "t").wait();
    all.broadcast(t, 0, "t").wait();
    EXPECT_TRUE(at::equal(t, ramp));
    all.all_gather(out, t, "t").wait();
    EXPECT_TRUE(at::equal(out, ramp));
    out.zero_();
    at::Tensor rows = t.narrow(0, 0, 1000).view({100, 10}), to = at::empty_like(rows), none = rows.narrow(0, 0, 0),
               to_none = to.narrow(0, 0, 0);
    all.all_to_all(to, rows, {100}, {100}, "rows").wait();
    EXPECT_TRUE(at::equal(to, rows));
    all.all_to_all(to_none, none, {0}, {0}, "no rows").wait();
  }
  EXPECT_EQ(all.all_gather_text("x", "t"), std::vector<std::string>{"x"});
  all.barrier("end");
  EXPECT_GE(all.take_traffic().calls, 20);
}

#ifndef MOEGRAFT_HAVE_CUDA
TEST(Nccl, ABuildWithoutItSaysHowToGetIt) {
  try {
    make_nccl({}, 0, 2, std::chrono::seconds(1), "world", at::Device(at::kCUDA, 0));
    FAIL() << "there is no NCCL here";
  } catch (const UserError& e) {
    for (const char* word :
         {"NCCL", "MOEGRAFT_CUDA=ON", "tools/setup.sh --cuda", "MOEGRAFT_NCCL_INCLUDE", "model.device: cpu"})
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << word;
  }
}
#endif

}  // namespace
}  // namespace moegraft::distributed
