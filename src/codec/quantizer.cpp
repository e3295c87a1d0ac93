#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/codec/train.h"
#include "moegraft/ot/kmeans.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kSpreadStartLimit = 2048;       // codes; the spread start looks at every point once per code
constexpr int64_t kDistances = int64_t{1} << 27;  // 512 MiB

at::Tensor rows(const at::Tensor& points, const std::vector<int64_t>& picks) {
  return points.index_select(0, at::tensor(picks, at::kLong).to(points.device()));
}

}  // namespace

EmaCodebook::EmaCodebook(at::Tensor codebook_NZ, double decay, double revive_below)
    : codebook_NZ_(codebook_NZ.detach().clone()), decay_(decay), revive_below_(revive_below) {}

EmaCodebook::EmaCodebook(const io::TensorMap& state, int64_t codes, int64_t width, double decay, double revive_below)
    : decay_(decay), revive_below_(revive_below) {
  const auto take = [&](const char* name, std::vector<int64_t> shape, at::ScalarType type) {
    const auto found = state.find(name);
    MOEGRAFT_CHECK(found != state.end(), "the checkpoint has no tensor ", name);
    MOEGRAFT_CHECK(found->second.sizes() == at::IntArrayRef(shape) && found->second.scalar_type() == type, "tensor ",
                   name, " of the checkpoint must be ", c10::toString(type), " ", shape, ", got ",
                   c10::toString(found->second.scalar_type()), " ", found->second.sizes().vec());
    return found->second.clone();
  };
  codebook_NZ_ = take("codebook.codes", {codes, width}, at::kFloat);
  revived_ = take("codebook.revived", {}, at::kLong).item<int64_t>();
  if (!state.contains("codebook.counts")) return;
  counts_N_ = take("codebook.counts", {codes}, at::kFloat);
  sums_NZ_ = take("codebook.sums", {codes, width}, at::kFloat);
}

io::TensorMap EmaCodebook::state() const {
  io::TensorMap state{{"codebook.codes", codebook_NZ_}, {"codebook.revived", at::scalar_tensor(revived_, at::kLong)}};
  if (counts_N_.defined()) state["codebook.counts"] = counts_N_, state["codebook.sums"] = sums_NZ_;
  return state;
}

int64_t EmaCodebook::update(const at::Tensor& z_MZ, const at::Tensor& ids_M, uint64_t seed, uint64_t step) {
  at::NoGradGuard no_grad;
  const int64_t codes = codebook_NZ_.size(0), rows_seen = z_MZ.size(0);
  const double fair = double(rows_seen) / double(codes);
  if (!counts_N_.defined()) {
    counts_N_ = at::full({codes}, fair, codebook_NZ_.options());
    sums_NZ_ = codebook_NZ_ * fair;
  }
  const auto z = z_MZ.detach();
  counts_N_.mul_(decay_).add_(at::bincount(ids_M, {}, codes).to(at::kFloat), 1 - decay_);
  sums_NZ_.mul_(decay_).add_(at::zeros_like(sums_NZ_).index_add_(0, ids_M, z), 1 - decay_);
  const auto dead = at::nonzero(counts_N_ < revive_below_).flatten();
  const int64_t revived = std::min(dead.size(0), rows_seen);
  if (revived > 0) {
    auto picks = Rng(seed, "codec.revive", step).permutation(rows_seen);
    picks.resize(size_t(revived));
    const auto which = dead.narrow(0, 0, revived);
    sums_NZ_.index_copy_(0, which, rows(z, picks) * fair);
    counts_N_.index_fill_(0, which, fair);
  }
  codebook_NZ_ = sums_NZ_ / counts_N_.clamp_min(1e-6).unsqueeze(1);
  revived_ += revived;
  return revived;
}

at::Tensor fit_codebook(const at::Tensor& points_MZ, int64_t codes, int64_t rounds, uint64_t seed) {
  ot::KMeansSettings settings;
  settings.restarts = 1, settings.max_iterations = rounds, settings.tolerance = -1, settings.seed = seed,
  settings.purpose = "codec.kmeans";
  settings.start = codes <= kSpreadStartLimit ? ot::KMeansStart::spread : ot::KMeansStart::rows;
  settings.empty = ot::EmptyCluster::restart;
  settings.sums = at::kFloat, settings.distances = kDistances;
  return ot::kmeans(points_MZ, codes, settings).centres_KD;
}

}  // namespace moegraft::codec
