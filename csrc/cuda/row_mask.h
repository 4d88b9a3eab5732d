// The masks of parameters as kernels over rows take them, and as torch does.
#pragma once

#include "cuda/device_mask.h"
#include "cuda/kernels/weight_mask.h"
#include "ops/parameter_args.h"

namespace prunekernels {

// The mask of a parameter, where anything of it is dead.
class RowMask {
 public:
  RowMask(const char* op, const std::optional<at::Tensor>& mask, const at::Tensor& parameter)
      : mask_(device_row_mask(op, mask, parameter)) {
    if (mask_) words_ = *mask;
  }

  explicit operator bool() const { return mask_ != nullptr; }
  WeightMask of_rows(const char* op, const at::Tensor& parameter, const RowLayout& layout) const;

  // value where the parameter is live, else other; by torch, for doubles
  at::Tensor choose(const at::Tensor& value, const at::Tensor& other) const;
  at::Tensor live(const at::Tensor& parameter) const;  // bool, to broadcast

 private:
  std::shared_ptr<const DeviceMask> mask_;
  at::Tensor words_;
};

// One for each parameter; masks may be [].
std::vector<RowMask> read_row_masks(const char* op, const OptionalTensors& masks, at::TensorList parameters);

}  // namespace prunekernels
