#pragma once
// Draws pictures: many sequences in one batched decode.

#include <torch/types.h>

#include <functional>
#include <string>
#include <vector>

#include "moegraft/generate/prompt.h"
#include "moegraft/generate/sampling.h"

namespace moegraft::generate {

struct ImageOptions {
  std::string modality;  // empty: the model's only one
  int64_t n = 1;         // pictures per prompt
  double cfg = 1.0;      // logits = uncond + cfg * (cond - uncond); 1: off, no second pass
  SamplingOptions sampling;
  uint64_t seed = 0;
  int64_t max_batch = 64;                      // pictures decoded together, at most
  int64_t max_cache_bytes = int64_t{1} << 30;  // fewer are taken when their caches would need more
  DecodeSteps steps = DecodeSteps::automatic;
  bool pixels = true;                                            // false: ids only, no codec needed
  std::function<void(int64_t done, int64_t total)> on_progress;  // in codes drawn
};

struct ImageResult {
  int64_t prompt = 0;     // index into the prompts
  int64_t index = 0;      // of the picture, 0 .. n-1
  at::Tensor ids_L;       // int64 [item_length], codes in [0, num_codes), CPU
  at::Tensor pixels_3HW;  // float32 in [0,1], CPU; undefined without pixels
};

// Results ordered by prompt, then index: picture i of prompt p is at p * n + i.
//
// The sequence is the prompt's tokens, begin, then exactly item_length codes drawn from the modality's code rows alone,
// each place from its codebook's; begin and end are forced. With pixels = false any modality is drawn, also one whose
// codec is not of images. The random stream of a picture is Rng(seed, "generate.image", hash of the prompt's tokens and
// index): it depends on neither n, nor the batch, nor the other prompts (the same prompt twice gives the same
// pictures). Prompts are run one by one and copied to their pictures, so only the products of decode steps see the
// batch; matrix products may change a logit's last bits with the number of rows, which moves a draw only when its
// uniform number falls into that gap (~1e-6). max_batch = 1 rules even that out.
//
// UsageError: no prompts, no such modality, an option out of range. UserError: prompt and picture do not fit the
// model's positions, no codec, a bad prompt.
std::vector<ImageResult> generate_images(const graft::GraftedModel& model, const std::vector<Prompt>& prompts,
                                         const ImageOptions& options = {});
std::vector<ImageResult> generate_images(const graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                         const ImageOptions& options = {});

}  // namespace moegraft::generate
