#pragma once
// Where LoRA's A starts; B stays zero, so that step 0 equals the base.

#include <torch/types.h>

#include <string>

#include "moegraft/adapters/adapter.h"
#include "moegraft/graft/calibration.h"
#include "moegraft/ot/config.h"

namespace moegraft::graft {

// [..., P, in] uniform in +-1/sqrt(in): Kaiming with a = sqrt(5), as PEFT does. float32.
at::Tensor kaiming_A(at::IntArrayRef shape, uint64_t seed, const std::string& name);

struct GwSubspaceReport {
  double objective = 0, row_perplexity = 0;
  bool converged = false;
  int64_t directions = 0;  // rows of A that the data decided; the rest are Kaiming's
};

// A [P,D] float32 from inputs of one site: x_v [n_v,D] of the new modality, x_t [n_t,D] of text. T = GW(x_v, x_t); X^ =
// diag(1/p) T x_t is where each new state would lie among text states; M the ridge solution of x_v M^T = X^; A = U^T M
// with U the top-P right singular vectors of x_v M^T. Rows have Kaiming's expected norm sqrt(1/3). UserError: shapes,
// NaN, no rows.
at::Tensor gw_subspace_A(const at::Tensor& x_v, const at::Tensor& x_t, int64_t rank, const ot::OtConfig& ot,
                         uint64_t seed, GwSubspaceReport* report = nullptr);

// The control without GW: top-P right singular vectors of x_v, same norm.
at::Tensor activation_svd_A(const at::Tensor& x_v, int64_t rank, uint64_t seed);

// Puts an adapter's parameters where they begin, and fills every A of its factors(), if its kind has any; returns a
// JSON report. A method that looks at activations needs `calibration` and acts on expert sites (gate and up share one A
// at the start); attention sites get Kaiming's. `modality` names the new rows in the calibration. An expert with fewer
// than P rows of what the method reads (the new modality's, and text's where it couples them) uses its layer's pool,
// and Kaiming's A when that is short too (counted in the report).
std::string initialise_lora(adapters::Adapter& adapter, adapters::FactorInit method, const Calibration* calibration,
                            int64_t modality, const ot::OtConfig& ot, uint64_t seed);

}  // namespace moegraft::graft
