#pragma once
// Frozen weights laid out for block products, made at first use (quantised ones at once) and shared by whoever holds
// the weight.

#include <array>
#include <mutex>

#include "../formats/formats.h"
#include "block_product.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

// One frozen matrix W [N, K]: forward panels of y = x W^T, backward panels of dx = dy W.
class WeightPanels {
 public:
  explicit WeightPanels(at::Tensor weight_NK, OnPacked on_packed = nullptr);
  WeightPanels(const at::Tensor& weight_NK, const BlockFormat& format);  // quantised
  // Whether products in this dtype can read them.
  bool serve(at::ScalarType dtype) const {
    return has_block_products(dtype) && (format_ || dtype == weight_.scalar_type());
  }
  template <class T>
  Panels<T> forward() {
    return panels<T>(forward_, false);
  }
  template <class T>
  Panels<T> backward() {
    return panels<T>(backward_, true);
  }

  // Of a quantised matrix.
  int64_t bytes() const { return int64_t(blocks_.nbytes()); }
  at::Tensor dense() const;                            // float32 [N, K]
  at::Tensor dense_rows(const at::Tensor& ids) const;  // float32 [ids.numel(), K]

 private:
  struct Layout {
    at::Tensor blob;
    std::once_flag once;
  };
  template <class T>
  Panels<T> panels(Layout& layout, bool backward);

  int64_t rows_, columns_;
  at::Tensor weight_;
  OnPacked on_packed_;
  Layout forward_, backward_;
  const BlockFormat* format_ = nullptr;
  at::Tensor blocks_;  // uint8
};

// The three matrices of every expert of a layer.
class ExpertPanels {
 public:
  // Stored backward panels serve the backward pass as they are; without them forward ones are turned as they are
  // needed.
  ExpertPanels(const ExpertFfnWeights& weights, OnPacked on_packed, bool stores_backward);
  ExpertPanels(const ExpertFfnWeights& weights, const BlockFormat& format);
  bool stores_backward() const { return stores_backward_; }
  bool serve(at::ScalarType dtype) const {
    return has_block_products(dtype) && (format_ || dtype == weights_[0].front().scalar_type());
  }
  int64_t num_experts() const { return experts_; }
  int64_t expert_width() const { return shapes_[kGateMatrix].first; }
  int64_t bytes() const { return int64_t(forward_.nbytes()); }  // quantised
  enum Matrix { kGateMatrix, kUpMatrix, kDownMatrix };
  // Call once before the panels are read by several threads.
  template <class T>
  void prepare_forward();
  template <class T>
  void prepare_backward();
  template <class T>
  Panels<T> forward(int64_t expert, Matrix matrix) const {
    return panels<T>(expert, matrix, false);
  }
  template <class T>
  Panels<T> backward(int64_t expert, Matrix matrix) const {
    return panels<T>(expert, matrix, true);
  }

 private:
  explicit ExpertPanels(const ExpertFfnWeights& weights);
  template <class T>
  Panels<T> panels(int64_t expert, Matrix matrix, bool backward) const;
  template <class T>
  void pack(at::Tensor& blob, bool backward);

  int64_t experts_ = 0;
  std::array<std::pair<int64_t, int64_t>, 3> shapes_;  // [out, in] of each matrix
  std::array<std::vector<at::Tensor>, 3> weights_;     // [out, in] each; none where quantised
  at::Tensor forward_, backward_;                      // [E, elements or bytes]
  OnPacked on_packed_;
  bool stores_backward_ = false;
  const BlockFormat* format_ = nullptr;
  std::once_flag forward_once_, backward_once_;
};

}  // namespace moegraft::kernels
