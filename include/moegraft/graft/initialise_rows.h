#pragma once
// Where the new modality's embedding and head rows start (GROMOV_WASSERSTEIN: T couples codebook vectors Z with text
// embedding rows E_t by the distances inside each cloud). Row order: begin, end, then code 0..N-1.

#include <torch/types.h>

#include <string>
#include <vector>

#include "moegraft/graft/config.h"
#include "moegraft/ot/config.h"
#include "moegraft/ot/gromov_wasserstein.h"

namespace moegraft::graft {

// What the rows look like, of the code rows alone.
struct RowStatistics {
  double mean_norm = 0;
  double rms_deviation = 0;  // root mean square distance to their mean
  double effective_rank =
      0;                   // exp(entropy of the normalised singular values) of the centred rows (Roy & Vetterli 2007)
  double mean_cosine = 0;  // over pairs: near 1 the rows point one way
};
RowStatistics row_statistics(const at::Tensor& rows_ND);

struct RowsReport {
  RowInit method = RowInit::random;
  RowStatistics text, raw, embedding, head;  // text rows; code rows before and after matching mean and scale; head rows
  // GW methods only.
  bool used_gw = false;
  int64_t points_x = 0, points_y = 0;  // sizes of the coupled clouds
  double objective = 0, row_perplexity = 0, uniform_perplexity = 0;
  bool converged = false;
  std::string reason;
  std::vector<ot::Stage> stages;
  std::vector<std::string> warnings;  // collapsed rows, unsharp plan, rank bounded by the codebook
  std::string to_json() const;
};

struct RowsInit {
  at::Tensor embedding_ND, head_ND;  // float32; one tensor when the base ties them
  RowsReport report;
};

// What the methods do, beyond what their table (config.h) says:
//   gw_barycentric  diag(1/p) T E_t, mean and scale matched to the text rows
//   gw_procrustes   (Z - mean) polar(Z^T T E_t), mean and scale matched: keeps the codebook's geometry, rank at most
//   d_z
// The head follows the embedding's coupling (same T, same rows) applied to the text head rows: what a code means as
// input and as output then agrees, as it does for text tokens; its mean and scale match the text head's.
// text_embedding_VD, text_head_VD [V,D] any float dtype (head undefined or the same tensor: tied); codebook_NZ [N,d_z].
// The special rows (begin, end) are drawn as moment_match does. Pure function of its arguments. UserError: shapes, NaN.
RowsInit initialise_rows(RowInit method, const at::Tensor& text_embedding_VD, const at::Tensor& text_head_VD,
                         const at::Tensor& codebook_NZ, int64_t num_special, const ot::OtConfig& ot, uint64_t seed);

// The solver settings of a run's `ot` section, for clouds of n and m points: epsilon annealed until the plan is sharp,
// tolerances that suit an initialisation.
ot::Settings solver_settings(const ot::OtConfig& ot, int64_t n, int64_t m);

}  // namespace moegraft::graft
