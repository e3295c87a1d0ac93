#pragma once
// A base of random weights: what benchmarks need of a model whose weights are not at hand.

#include <torch/types.h>

#include <filesystem>

#include "moegraft/model/weights.h"

namespace moegraft::model {

// Of a config.json by itself, whatever its name; read_spec is of a directory.
DecoderSpec read_spec_file(const std::filesystem::path& config_json);

// Frozen, drawn on the device in `dtype`, one tensor at a time, so that nothing passes through the host. Weights are
// normal with variance 1 / fan-in, so that activations keep their size and routing is spread but uneven; norms are 1.
// Equal seeds give equal weights on one device. quantise: the matrices then become quantised, as load_base makes them.
BaseModel random_base(const DecoderSpec& spec, at::ScalarType dtype, at::Device device, uint64_t seed = 0,
                      std::optional<kernels::WeightFormat> quantise = {});

// The first `layers` layers of a model. UsageError: none, or more than there are.
DecoderSpec cut_layers(DecoderSpec spec, int64_t layers);

}  // namespace moegraft::model
