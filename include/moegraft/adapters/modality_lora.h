#pragma once
// LoRA (arXiv:2106.09685) on the experts' gate, up and down and on attention, gated by modality: trained factors A and
// B, float32 leaves.

#include "moegraft/adapters/adapter.h"

namespace moegraft::adapters {

class ModalityLora : public Adapter {
 public:
  // A is zero until an initialisation fills it, B stays zero.
  explicit ModalityLora(const AdapterContext& context);
  ModalityLora(const model::DecoderSpec& spec, const AdapterConfig& config, int64_t index,
               std::vector<int64_t> modalities, at::Device device, std::pair<int64_t, int64_t> experts = {0, 0})
      : ModalityLora(AdapterContext{spec, config, index, std::move(modalities), device, experts}) {}

  double scale() const override { return scale_; }
  std::vector<Parameter> parameters() const override;
  void initialise() override;
  const std::vector<Factor>& factors() const override { return factors_; }

 private:
  std::vector<model::LowRank> terms(size_t position) const override;

  double scale_;
  std::vector<Factor> factors_;  // by position
};

}  // namespace moegraft::adapters
