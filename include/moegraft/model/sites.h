#pragma once
// Where adapters plug in. A site yields descriptions that kernels can fuse, not black boxes.

#include <torch/types.h>

#include <vector>

#include "moegraft/model/batch.h"

namespace moegraft::model {

// Of attention: q, k, v, o. Of the FFN: gate, up, down, which mean every routed expert's in a model that has experts,
// and every layer's in a dense model. router: the product that scores the experts.
enum class Site { q, k, v, o, gate, up, down, router };
inline constexpr Site kAllSites[] = {Site::q,    Site::k,  Site::v,    Site::o,
                                     Site::gate, Site::up, Site::down, Site::router};

// y += scale * w * (x A^T) B^T on tokens of `modalities`, w the token's weight. A [P,in], B [out,P]; of experts A
// [E,P,in], B [E,out,P].
struct LowRank {
  at::Tensor A, B;  // float32 masters (leaves) or their compute-dtype copies
  double scale = 1.0;
  std::vector<int64_t> modalities;  // modality ids it acts on
  // float32, a number for every token of the pass (those of other modalities are not read), differentiable; undefined:
  // ones. Of experts, a token's weight holds for all that it is routed to. Not under expert parallelism, where tokens
  // of other processes come without theirs (InvariantError).
  at::Tensor weight_T{};
};

// A layer's MLP (the dense FFN, or router and experts) as it begins, for what an adapter makes of it.
struct MlpInput {
  int64_t layer;
  const at::Tensor& x_TD;  // after the norm, in the compute dtype; part of the graph
  const PackedBatch&
      batch;  // with facts: the tokens of this pass, which a frozen prefix and a cache leave others out of
  bool every_token = false;  // the gate is open: what acts on some modality acts on all tokens
  bool with_loss = false;    // parts of losses are asked for

  // The tokens on which what belongs to these modalities acts, int64, each once. Without any, an adapter adds nothing
  // to the pass.
  at::Tensor tokens_of(const std::vector<int64_t>& modalities) const;
  // Numbers of these tokens (of any floating dtype, differentiable) as a LowRank's weights: [T], zero elsewhere.
  at::Tensor spread(const at::Tensor& weight_X, const at::Tensor& tokens_X) const;
};

class AdapterSites;

// What an adapter does in an MLP, in one pass. Nothing of it may touch other tokens than MlpInput::tokens_of its
// modalities.
struct MlpTerms {
  std::vector<LowRank> gate, up,
      down;  // of the sites that the layer has: a dense layer of a model with experts has none of these
  // Added to the MLP's output on these tokens: y_XD of any floating dtype, differentiable.
  struct Branch {
    at::Tensor tokens_X, y_XD;
  };
  std::vector<Branch> branches;
  // Of an adapter's own loss, where it has one and is asked: what this layer knows for it, float32, any shape,
  // differentiable.
  struct LossPart {
    const AdapterSites* of;  // whose loss() takes it
    at::Tensor part;
  };
  std::vector<LossPart> losses;
};

class AdapterSites {
 public:
  virtual ~AdapterSites() = default;
  // What acts at a site in every pass.
  virtual std::vector<LowRank> at(int64_t layer, Site site) const = 0;
  // What acts in a layer's MLP in this pass, in place of at() of gate, up and down, which it is by default. Called once
  // per layer and pass; where a layer is recomputed, once more in the backward pass with the same input, for the same
  // values.
  virtual MlpTerms mlp(const MlpInput& in) const;
  // This adapter's loss in one pass, from the parts of the layers that gave one, in their order: a float32 scalar with
  // its coefficient. By default their sum, for parts that are losses themselves; others pool over layers what they have
  // counted (sums and their numbers, say).
  virtual at::Tensor loss(const std::vector<at::Tensor>& parts) const;
  // Whether branches or losses of mlp() act on text, or look at it: then no text is a frozen prefix. Terms say so by
  // their modalities.
  virtual bool mlp_takes_text() const { return false; }
};

// The new modality's rows. Ids V + first .. V + first + count - 1 look up `embedding`; logits come from `head`.
struct ModalityRows {
  int64_t modality = 1;
  int64_t first_id = 0;     // V for the first modality
  at::Tensor embedding_ND;  // float32 master
  at::Tensor head_ND;       // the embedding when the base ties them
};

}  // namespace moegraft::model
