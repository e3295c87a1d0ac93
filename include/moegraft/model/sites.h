#pragma once
// Where adapters plug in. A site yields descriptions that kernels can fuse, not black boxes.

#include <torch/types.h>

#include <vector>

namespace moegraft::model {

// Of attention: q, k, v, o. Of the FFN: gate, up, down, which mean every routed expert's in a model that has experts,
// and every layer's in a dense model. router: the product that scores the experts.
enum class Site { q, k, v, o, gate, up, down, router };
inline constexpr Site kAllSites[] = {Site::q,    Site::k,  Site::v,    Site::o,
                                     Site::gate, Site::up, Site::down, Site::router};

// y += scale * (x A^T) B^T on rows of `modality`. A [P,in], B [out,P]; of experts A [E,P,in], B [E,out,P].
struct LowRank {
  at::Tensor A, B;  // float32 masters (leaves) or their compute-dtype copies
  double scale = 1.0;
  std::vector<int64_t> modalities;  // modality ids it acts on
};

class AdapterSites {
 public:
  virtual ~AdapterSites() = default;
  virtual std::vector<LowRank> at(int64_t layer, Site site) const = 0;
};

// The new modality's rows. Ids V + first .. V + first + count - 1 look up `embedding`; logits come from `head`.
struct ModalityRows {
  int64_t modality = 1;
  int64_t first_id = 0;     // V for the first modality
  at::Tensor embedding_ND;  // float32 master
  at::Tensor head_ND;       // the embedding when the base ties them
};

}  // namespace moegraft::model
