// The dense plan on CPU: where-masks around the vendor's full-width convolution, each doing nothing where it can; and
// what every plan needs besides.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/conv_args.h"

namespace prunekernels {

at::Tensor dense_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias);
at::Tensor dense_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight);

// Whether the gradient of the whole weight [K, C / G, R, S] shows, at less cost than the gradient of the input will,
// that grad_out is finite wherever a window is not all padding: each number there is a term of one in the first
// channels.
bool shows_finite(const at::Tensor& grad_weight, const ConvShape& shape);

// In place: where(live, grad * scale, 0). Null mask: nothing is dead.
void mask_grad_weight(const char* op, const at::Tensor& grad, const MaskTable* mask, const OptionalTensor& scale);

// In place: the output of a live filter without live kernels is its bias, or 0 without one.
void write_constants(const ConvCall<MaskTable>& call, const at::Tensor& y, const OptionalTensor& bias);

// [N, K, P, Q] -> [K], 0 where the filter is dead. Null mask: nothing is dead.
at::Tensor channel_sums(const char* op, const at::Tensor& x, const MaskTable* mask);

}  // namespace prunekernels
