#pragma once
// Attention through cuDNN's graphs (cudnn-frontend), for builds that found its headers: packed sequences, causal from
// the bottom right, grouped heads, windows, a deterministic backward pass. Has not run on a GPU: choose_attention
// (attention_choice.h) leaves it off unless it is asked for.

#include "../attention.h"

namespace moegraft::kernels {

// cudnnGetVersion(); 0 in a build without the headers (the rest then throws), -1 in one without CUDA (the rest is then
// not there).
int64_t cudnn_attention_version();

// lengths: on the device, int32. out.extra holds what the backward pass wants beside out and lse.
AttentionOutput attention_forward_cudnn(const AttentionProblem& problem, const DeviceLengths& lengths);
AttentionGradients attention_backward_cudnn(const AttentionProblem& problem, const AttentionOutput& output,
                                            const at::Tensor& dout_THC);

}  // namespace moegraft::kernels
