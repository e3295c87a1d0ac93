#pragma once
// What our sources use of LibTorch, and the one precompiled header. torch/torch.h (nn, optim, data, serialize) would
// triple the compile time of every file; a file that needs more includes that header itself.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/cuda.h>
#include <torch/types.h>
