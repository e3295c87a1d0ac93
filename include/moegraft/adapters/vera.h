#pragma once
// VeRA (arXiv:2310.11454) gated by modality: y += diag(b) B diag(d) A x with frozen random A and B that all sites
// share, and two trained vectors per site and expert. About rank + out numbers where LoRA trains rank * (in + out).

#include "moegraft/adapters/adapter.h"

namespace moegraft::adapters {

class Vera : public Adapter {
 public:
  // A [rank, largest in] and B [largest out, rank] are drawn from config.projection_seed, Kaiming uniform; a site reads
  // their first columns and rows, as in PEFT.
  explicit Vera(const AdapterContext& context);

  double scale() const override { return 1.0; }
  std::vector<Parameter> parameters() const override;
  void initialise() override;  // b: zeros, d: config.d_initial

  const at::Tensor& shared_A() const { return A_PX_; }
  const at::Tensor& shared_B() const { return B_YP_; }

 private:
  // A' = diag(d) A, B' = diag(b) B: made in the call, under autograd where gradients are recorded, else kept until b or
  // d changes.
  std::vector<model::LowRank> terms(size_t position) const override;

  struct Site {
    std::string name;
    int64_t layer;
    at::Tensor d, b;        // leaves: [P] and [out], of experts [E, P] and [E, out]
    at::Tensor A_PX, B_YP;  // this site's part of the shared ones
    // Without gradients.
    mutable at::Tensor made_A, made_B;
    mutable int64_t d_version = -1, b_version = -1;
  };
  at::Tensor A_PX_, B_YP_;
  std::vector<Site> sites_;  // by position
};

}  // namespace moegraft::adapters
