#pragma once
// Text drift: what a graft changes of its base's text logits. The contract is that it changes no bit.

#include <string>
#include <vector>

#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

// Takes rows and adapters off the decoder for its lifetime: the bare base.
class Detached {
 public:
  explicit Detached(graft::GraftedModel& model);
  ~Detached();
  Detached(const Detached&) = delete;

 private:
  graft::GraftedModel& model_;
  std::vector<model::ModalityRows> rows_;
};

struct DriftCase {
  std::string name;    // "1x1", "3x37", "packed", "decode"
  double max_abs = 0;  // largest |difference| of a logit in columns 0..V-1
  bool equal_bits = false;
};

struct Drift {
  std::vector<DriftCase> cases;
  double gate_open = 0;    // the same for 3x37 with the adapters acting on text too: shows that the comparison can fail
  double max_abs() const;  // over the cases
  bool exact() const;      // every bit of every case
};

// Random text ids through the bare base and through the graft, in one process and the model's own dtype.
// tests/evaluate/drift_test.cpp does the same with separate processes. UsageError when the model has no modality.
Drift measure_drift(graft::GraftedModel& model, uint64_t seed);

}  // namespace moegraft::evaluate
