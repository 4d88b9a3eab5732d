// Lists of tensors as rows, for operators that pass over all rows of all layers in one go.
#pragma once

#include <ATen/ops/empty_like.h>

#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "conv_args.h"
#include "cpu/denormals.h"
#include "cpu/row_mask.h"
#include "cpu/shares.h"

namespace prunekernels {

struct OfThread {
  const FlushDenormals flush;
  RowBits bits;
};

inline at::ScalarType sum_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_length(const char* op, const char* argument, size_t length, size_t count, bool may_be_empty = true) {
  PK_CHECK(length == count || (may_be_empty && length == 0), op, argument, c10::str(count, " tensors"), length);
}

// Rows that lie one after the other; a tensor with others is copied, and copied back by write_back.
class Rows {
 public:
  Rows(const char* op, const char* argument, at::TensorList tensors) {
    for (const at::Tensor& tensor : tensors) {
      check_dtype(op, argument, tensor, tensors[0]);
      PK_CHECK(tensor.dim() >= 1, op, argument, "tensors of at least one dimension", tensor.sizes());
      const bool serves = row_layout(tensor).has_value();
      tensors_.push_back(serves ? tensor : tensor.contiguous());
      if (!serves) copies_.emplace_back(tensor, tensors_.back());
      layouts_.push_back(*row_layout(tensors_.back()));
      costs_.push_back(tensor.numel());
    }
  }

  size_t size() const { return tensors_.size(); }
  const at::Tensor& operator[](size_t i) const { return tensors_[i]; }
  const RowLayout& layout(size_t i) const { return layouts_[i]; }
  at::ScalarType type() const { return tensors_[0].scalar_type(); }

  // A tensor of the same size in the layout of tensor i.
  at::Tensor beside(const char* op, const char* argument, const at::Tensor& tensor, size_t i) const {
    PK_CHECK(tensor.sizes() == tensors_[i].sizes(), op, argument, tensors_[i].sizes(), tensor.sizes());
    const std::optional<RowLayout> layout = row_layout(tensor);
    const bool serves = layout && (layout->channels_last == layouts_[i].channels_last || layouts_[i].taps == 1);
    return serves ? tensor : at::empty_like(tensors_[i], tensor.options()).copy_(tensor);
  }

  void written() const {
    for (const at::Tensor& tensor : tensors_) tensor.unsafeGetTensorImpl()->bump_version();
    for (const auto& [tensor, copied] : copies_) tensor.copy_(copied);
  }

  // work(thread, i, row): all rows of all tensors, shared by elements.
  template <typename Work>
  void each(const Work& work) const {
    share_among_threads<OfThread>(costs_, [&](OfThread& thread, size_t i, int64_t first, int64_t last) {
      const RowRange range(first, last, costs_[i], layouts_[i].rows);
      for (int64_t row = range.begin; row < range.end; ++row) work(thread, i, row);
    });
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<RowLayout> layouts_;
  std::vector<int64_t> costs_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

}  // namespace prunekernels
