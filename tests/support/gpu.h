#pragma once
// Tests that need a GPU skip with a reason; with MOEGRAFT_REQUIRE_GPU=1 they fail instead.

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <cstdlib>

#define MOEGRAFT_NEEDS_GPU()                                                      \
  do {                                                                            \
    if (!torch::cuda::is_available()) {                                           \
      const char* required = std::getenv("MOEGRAFT_REQUIRE_GPU");                 \
      if (required && std::string(required) == "1")                               \
        FAIL() << "MOEGRAFT_REQUIRE_GPU=1, but there is no usable CUDA device";   \
      GTEST_SKIP() << "no usable CUDA device (or a build without MOEGRAFT_CUDA)"; \
    }                                                                             \
  } while (0)
