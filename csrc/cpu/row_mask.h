// The mask of a parameter as its rows see it, for operators that pass over whole parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/mask_table.h"
#include "ops/parameter_args.h"

namespace prunekernels {

// Checks a table made by conv_mask against the parameter (of a vector, against its length); empty where nothing is
// dead.
std::optional<MaskTable> read_row_mask(const char* op, const std::optional<at::Tensor>& mask,
                                       const at::Tensor& parameter);

// Whether two live rows have the same live channels; none does if either is padding.
bool same_channels(const MaskTable& mask, int32_t a, int32_t b);

// Live elements of rows as kernels take them, for one thread: rows one after the other mostly have the same dead
// channels, and then share the bits. Null: all live. Valid until the next call.
class RowBits {
 public:
  const uint32_t* of_row(const MaskTable& mask, const RowLayout& layout, int64_t row);
  const uint32_t* of_vector(const MaskTable& mask);

 private:
  std::vector<uint32_t> pairs_, bits_;
  RowLayout layout_{};
  bool full_ = false;
};

}  // namespace prunekernels
