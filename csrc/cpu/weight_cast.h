// Weights kept in float32 for activations in bfloat16 or float16: what a convolution reads of them, and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/mask_table.h"

namespace prunekernels {

// The weight in dtype and format. Filters that are dead under the mask are zeros or, unless `whole`, not written; null
// mask: all are live.
at::Tensor narrowed(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat format, const MaskTable* mask,
                    bool whole);

// A gradient in the dtype and layout of weight, zeros where the mask has dead filters.
at::Tensor widened(const at::Tensor& grad, const at::Tensor& weight, const MaskTable* mask);

}  // namespace prunekernels
