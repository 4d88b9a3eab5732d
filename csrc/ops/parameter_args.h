// What the operators over rows of parameters check and derive first, whatever the device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "core/mask_table.h"

namespace prunekernels {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// A parameter as rows that lie one after the other: [rows, channels, taps], or [rows, taps, channels] if channels_last;
// of a vector (a bias, a norm's parameter) each row is one element.
struct RowLayout {
  int64_t rows, channels, taps;
  bool channels_last;
  int64_t row_elements() const { return channels * taps; }
};

// Empty if the rows do not lie so.
std::optional<RowLayout> row_layout(const at::Tensor& parameter);

// Checks a table against the parameter (of a vector, against its length); whether anything of it is dead.
bool masks_rows(const char* op, const MaskTable& table, const at::Tensor& parameter);

at::ScalarType sum_type(const at::Tensor& tensor);

void check_length(const char* op, const char* argument, size_t length, size_t count, bool may_be_empty = true);

// Rows that lie one after the other; a tensor with others is copied, and copied back by written.
class RowTensors {
 public:
  RowTensors(const char* op, const char* argument, at::TensorList tensors);

  size_t size() const { return tensors_.size(); }
  const at::Tensor& operator[](size_t i) const { return tensors_[i]; }
  const RowLayout& layout(size_t i) const { return layouts_[i]; }
  at::TensorList tensors() const { return tensors_; }
  at::ScalarType type() const { return tensors_[0].scalar_type(); }

  // A tensor of the same size in the layout of tensor i.
  at::Tensor beside(const char* op, const char* argument, const at::Tensor& tensor, size_t i) const;
  void written() const;

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<RowLayout> layouts_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

// ---- mask_grad_

struct MaskGradLists {
  const OptionalTensors& scales;
  at::TensorList weights, accumulated, abs_sums, square_sums, product_sums;
};

struct MaskGradTensors {  // of one gradient, laid out as it is; undefined where not asked for
  at::Tensor scale;       // [rows]
  at::Tensor weight;      // for product_sum
  at::Tensor accumulated;
  at::Tensor abs_sum, square_sum, product_sum;  // [rows]
};

class MaskGradArgs {
 public:
  MaskGradArgs(const char* op, const RowTensors& rows, const MaskGradLists& lists);

  const MaskGradTensors& operator[](size_t i) const { return tensors_[i]; }
  void written() const;

 private:
  std::vector<MaskGradTensors> tensors_;
  std::vector<std::pair<at::Tensor, at::Tensor>> accumulated_;  // as given, and in the gradient's layout
};

// ---- filter_norms

// For the sums of a weight: [rows], or per kernel [rows, channels].
at::Tensor empty_sums(const char* op, const at::Tensor& weight, bool per_kernel);

// ---- cluster_mean_

void check_clusters(const char* op, const at::Tensor& clusters, const at::Tensor& grad);

// Rows of the clusters with more than one, cluster by cluster.
std::vector<std::vector<int32_t>> members_of(const int32_t* clusters, int64_t rows);

}  // namespace prunekernels
