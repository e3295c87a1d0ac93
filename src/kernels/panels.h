#pragma once
// Frozen weights laid out for block products, made at first use and shared by whoever holds the weight.

#include <array>
#include <mutex>

#include "block_product.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

// One frozen matrix W [N, K]: forward panels of y = x W^T, backward panels of dx = dy W.
class WeightPanels {
 public:
  explicit WeightPanels(at::Tensor weight_NK, Packed packed = nullptr) : weight_(std::move(weight_NK)), packed_(std::move(packed)) {}
  template <class T>
  Panels<T> forward() { return panels<T>(forward_, false); }
  template <class T>
  Panels<T> backward() { return panels<T>(backward_, true); }

 private:
  struct Layout {
    at::Tensor blob;
    std::once_flag once;
  };
  template <class T>
  Panels<T> panels(Layout& layout, bool backward);

  at::Tensor weight_;
  Packed packed_;
  Layout forward_, backward_;
};

// The three matrices of every expert of a layer.
class ExpertPanels {
 public:
  explicit ExpertPanels(const ExpertFfnWeights& weights, Packed packed = nullptr, bool stores_backward = true);
  bool stores_backward() const { return stores_backward_; }
  enum Matrix { kGateMatrix, kUpMatrix, kDownMatrix };
  // Call once before the panels are read by several threads.
  template <class T>
  void prepare_forward();
  template <class T>
  void prepare_backward();
  template <class T>
  Panels<T> forward(int64_t expert, Matrix matrix) const { return panels<T>(forward_, expert, matrix, false); }
  template <class T>
  Panels<T> backward(int64_t expert, Matrix matrix) const { return panels<T>(backward_, expert, matrix, true); }

 private:
  template <class T>
  Panels<T> panels(const at::Tensor& blob, int64_t expert, Matrix matrix, bool backward) const;
  template <class T>
  void pack(at::Tensor& blob, bool backward);

  std::array<std::vector<at::Tensor>, 3> weights_;  // [out, in] each
  at::Tensor forward_, backward_;                   // [E, elements]
  Packed packed_;
  bool stores_backward_;
  std::once_flag forward_once_, backward_once_;
};

}  // namespace moegraft::kernels
