#include "moegraft/evaluate/ridge.h"

#include <gtest/gtest.h>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/io/json.h"

namespace moegraft::evaluate {
namespace {

TEST(Ridge, AgreesWithNumpy) {
  const auto golden = io::read_json(std::filesystem::path(test_source_dir()) / "tests/golden/evaluate/ridge.json");
  const auto matrix = [&](const char* key) {
    std::vector<at::Tensor> rows;
    for (const auto& row : golden[key]) rows.push_back(at::tensor(row.get<std::vector<double>>(), at::kDouble));
    return at::stack(rows);
  };
  const at::Tensor x = matrix("x"), y = matrix("y");
  const int64_t held_out = golden["held_out"], fitted = x.size(0) - held_out;
  const auto ratios = golden["ratios"].get<std::vector<double>>();
  for (const bool sparse : {false, true}) {
    SCOPED_TRACE(sparse ? "sparse" : "dense");
    const auto sums = [&](int64_t begin, int64_t count) {
      NormalEquations e(x.size(1), y.size(1));
      for (int64_t i = begin; i < begin + count; i += 5) {  // in parts
        const int64_t part = std::min<int64_t>(5, begin + count - i);
        e.add(sparse ? x.narrow(0, i, part).to_sparse() : x.narrow(0, i, part), y.narrow(0, i, part));
      }
      return e;
    };
    const NormalEquations rows = sums(0, fitted), rest = sums(fitted, held_out);
    for (size_t r = 0; r < ratios.size(); ++r) {
      const double error =
          rest.squared_error(rows.solve(ratios[r] * rows.mean_variance())) / double(held_out * y.size(1));
      EXPECT_NEAR(error, golden["errors"][r].get<double>(), 1e-9 * error);
    }
    const ChosenRidge chosen = choose_ridge(rows, rest, ratios);
    EXPECT_EQ(chosen.ratio, ratios[golden["best"].get<size_t>()]);
    EXPECT_NEAR(chosen.held_out_error, golden["errors"][golden["best"].get<size_t>()].get<double>(), 1e-9);
    EXPECT_NEAR(chosen.ridge.lambda, golden["lambda"].get<double>(), 1e-10);
    EXPECT_LT((chosen.ridge.weight_FP - matrix("weight")).abs().max().item<double>(), 1e-10);
    EXPECT_LT((chosen.ridge.predict(sparse ? x.to_sparse() : x) - matrix("prediction")).abs().max().item<double>(),
              1e-10);
  }
}

}  // namespace
}  // namespace moegraft::evaluate
