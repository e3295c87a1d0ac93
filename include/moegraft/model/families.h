#pragma once
// What the rest of the program asks of a model family; a family itself is one file of src/model/families/.

#include <string>

#include "moegraft/model/config.h"  // IWYU pragma: export   known_families()
#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"

namespace moegraft::model {

// The spec of a base from scratch: `sizes` names family, sizes and layers, and the family fills in what its
// architecture says (norms of q and k, biases, which layers are sparse). UserError: unknown family, sizes that it
// cannot have.
DecoderSpec complete_spec(DecoderSpec sizes);

// Where PEFT finds a site's weight (UserError for the router, which it cannot adapt): a module among a layer's children
// ("self_attn.q_proj") or, of experts, a parameter ("mlp.experts.gate_up_proj").
struct PeftModule {
  std::string name;
  bool second_half = false;  // of gate and up, which experts hold as one tensor, the lower rows
};
PeftModule peft_module(const DecoderSpec& spec, Site site);

}  // namespace moegraft::model
