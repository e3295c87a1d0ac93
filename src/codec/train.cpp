#include "moegraft/codec/train.h"

#include "libtorch.h"

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"

namespace moegraft::codec {

double psnr(double mse) { return -10 * std::log10(std::max(mse, 1e-10)); }

void CodecRunConfig::validate(const std::string& path) const {
  const std::string prefix = path.empty() ? "" : path + ".";
  MOEGRAFT_CHECK_USAGE(!dir.empty(), prefix, "dir must not be empty");
  MOEGRAFT_CHECK_USAGE(!data.train.empty(), prefix,
                       "data.train must list at least one source: - { path: pictures.jsonl }");
  MOEGRAFT_CHECK_USAGE(train.warm_share <= train.freeze_share, prefix, "train.warm_share (", train.warm_share,
                       ") must not exceed train.freeze_share (", train.freeze_share, ")");
}

Quality measure(const ImageCodec& codec, const at::Tensor& pixels_u8, int64_t batch) {
  at::NoGradGuard no_grad;
  Quality q;
  double total_mse = 0, total_l1 = 0, total_psnr = 0;
  at::Tensor counts = at::zeros({codec.num_codes()}, at::kDouble);
  for (int64_t i = 0; i < pixels_u8.size(0); i += batch) {
    const auto x = to_float(pixels_u8.narrow(0, i, std::min(batch, pixels_u8.size(0) - i)));
    const auto ids = codec.encode(x);
    const auto error = codec.decode(ids).cpu() - x;
    const auto mse_B = error.square().flatten(1).mean(1).to(at::kDouble);
    total_psnr += (mse_B.clamp_min(1e-10).log10() * -10).sum().item<double>();
    total_mse += mse_B.sum().item<double>();
    total_l1 += error.abs().flatten(1).mean(1).sum().item<double>();
    counts += at::bincount(ids.flatten().cpu(), {}, codec.num_codes()).to(at::kDouble);
    q.pictures += x.size(0);
  }
  if (q.pictures == 0) return q;
  q.psnr = total_psnr / double(q.pictures);
  q.psnr_pooled = psnr(total_mse / double(q.pictures));
  q.l1 = total_l1 / double(q.pictures);
  q.used_codes = (counts > 0).sum().item<int64_t>();
  const auto p = counts / counts.sum();
  q.perplexity = std::exp(-(p * p.clamp_min(1e-300).log()).sum().item<double>());
  return q;
}

}  // namespace moegraft::codec
