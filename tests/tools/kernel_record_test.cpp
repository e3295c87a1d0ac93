// How a step's kernels are added up. Here the recorder sees the CPU's operations; on a GPU it has not run yet.
#include "kernel_record.h"

#include <gtest/gtest.h>

#include "libtorch.h"

namespace moegraft::tools::bench {
namespace {

TEST(KernelRecord, TimeCountsOnceHoweverManyRun) {
  EXPECT_EQ(covered({}), 0u);
  EXPECT_EQ(covered({{10, 20}}), 10u);
  EXPECT_EQ(covered({{10, 20}, {20, 25}, {30, 31}}), 16u);
  EXPECT_EQ(covered({{40, 50}, {10, 30}, {15, 20}, {25, 45}}),
            40u);  // beside, within, and across each other; in no order
  EXPECT_EQ(covered({{5, 5}, {5, 5}}), 0u);
}

TEST(KernelRecord, TellsWhatRanHowOftenAndForHowLong) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::ones({200, 200}), y = at::ones({200, 200});
  KernelRecord record(at::kCPU);
  at::mm(x, y);
  at::mm(x, y);
  at::relu(x);
  const nlohmann::json j = record.finish();
  double last = 1e9, sum = 0;
  int64_t products = 0;
  for (const auto& k : j["kernels"]) {
    EXPECT_LE(k["s"].get<double>(), last) << "longest first";
    last = k["s"], sum += last;
    if (k["name"] == "aten::mm") products = k["calls"];
  }
  EXPECT_EQ(products, 2) << j.dump();
  EXPECT_GT(j["busy_s"].get<double>(), 0);
  EXPECT_LE(j["busy_s"].get<double>(), sum);  // an operation within another counts once
  EXPECT_LE(j["busy_s"].get<double>(), j["recorded_s"].get<double>());
  EXPECT_GE(j["launches"].get<int64_t>(), 3);
  EXPECT_EQ(j["copies_s"], 0.0);
  KernelRecord again(at::kCPU);  // one after the other
  EXPECT_EQ(again.finish()["launches"], 0);
}

}  // namespace
}  // namespace moegraft::tools::bench
