#pragma once
#include <filesystem>
#include <memory>

#include "moegraft/codec/codec.h"

namespace moegraft::codec {

// transformers' JanusVQVAE (LlamaGen's VQ-16): a folder of the VQ model alone ("janus_vqgan") or of a whole Janus
// checkpoint ("janus").
std::unique_ptr<ImageCodec> load_janus(const std::filesystem::path& dir);

}  // namespace moegraft::codec
