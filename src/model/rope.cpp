// Rotary frequencies: default, linear, dynamic NTK, YaRN (arXiv:2309.00071) and Llama-3, as transformers computes them.
#include "rope.h"

#include "libtorch.h"

#include <cmath>
#include <numbers>

namespace moegraft::model {
namespace {

at::Tensor base_frequencies(double theta, int64_t width) {
  return 1.0 / at::pow(theta, at::arange(0, width, 2, at::kFloat) / double(width));
}

at::Tensor yarn_frequencies(const RopeSpec& r, int64_t width) {
  const auto correction = [&](double rotations) {
    return double(width) * std::log(double(r.original_max_positions) / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(r.theta));
  };
  double low = correction(r.beta_fast), high = correction(r.beta_slow);
  if (r.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, double(width - 1));
  if (low == high) high += 0.001;
  const at::Tensor ramp = ((at::arange(width / 2, at::kFloat) - low) / (high - low)).clamp(0, 1), keep = 1 - ramp,
                   plain = base_frequencies(r.theta, width);
  return plain / r.factor * (1 - keep) + plain * keep;
}

double yarn_attention_factor(const RopeSpec& r) {
  if (r.attention_factor > 0) return r.attention_factor;
  const auto mscale = [&](double m) { return r.factor <= 1 ? 1.0 : 0.1 * m * std::log(r.factor) + 1.0; };
  return r.mscale > 0 && r.mscale_all_dim > 0 ? mscale(r.mscale) / mscale(r.mscale_all_dim) : mscale(1.0);
}

at::Tensor llama3_frequencies(const RopeSpec& r, int64_t width) {
  const at::Tensor f = base_frequencies(r.theta, width), wavelength = 2 * std::numbers::pi / f;
  const double length = double(r.original_max_positions), low = length / r.low_freq_factor,
               high = length / r.high_freq_factor;
  const at::Tensor slow = at::where(wavelength > low, f / r.factor, f);
  const at::Tensor smooth = (length / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
  const at::Tensor medium = (wavelength < high).logical_not() & (wavelength > low).logical_not();
  return at::where(medium, (1 - smooth) * slow / r.factor + smooth * slow, slow);
}

at::Tensor frequencies(const DecoderSpec& s, int64_t longest) {
  const RopeSpec& r = s.rope;
  const int64_t width = s.head_dim;
  if (r.type == "linear") return base_frequencies(r.theta, width) / r.factor;
  if (r.type == "yarn") return yarn_frequencies(r, width);
  if (r.type == "llama3") return llama3_frequencies(r, width);
  if (r.type == "dynamic") {
    const double length = double(std::max(longest, s.max_positions));
    const double theta = r.theta * std::pow(r.factor * length / double(s.max_positions) - (r.factor - 1),
                                            double(width) / double(width - 2));
    return base_frequencies(theta, width);
  }
  return base_frequencies(r.theta, width);
}

}  // namespace

Rotary::Rotary(const DecoderSpec& spec, at::Device device)
    : spec_(spec), frequencies_C_(frequencies(spec, 0).to(device)) {}

RotaryTables Rotary::tables(const at::Tensor& positions_T, int64_t longest) const {
  const bool stretched = spec_.rope.type == "dynamic" && longest > spec_.max_positions;
  const at::Tensor frequencies_C = stretched ? frequencies(spec_, longest).to(positions_T.device()) : frequencies_C_;
  const at::Tensor angles = positions_T.to(at::kFloat).unsqueeze(1) * frequencies_C.unsqueeze(0);
  const double scale = spec_.rope.type == "yarn" ? yarn_attention_factor(spec_.rope) : 1.0;
  return {angles.cos() * scale, angles.sin() * scale};
}

}  // namespace moegraft::model
