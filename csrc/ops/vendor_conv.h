// The vendor's convolution and its gradients, through torch: its choice of library, its settings.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <optional>

#include "ops/conv_args.h"

namespace prunekernels::vendor {

// What a function below takes for its size and layout alone. On a CPU no memory stands behind it: a block that is never
// read would still push the result out of the warm one that the system's allocator has, and new pages cost more than
// many a convolution.
at::Tensor sizes_only(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

inline at::Tensor conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const ConvParams& p, int64_t groups) {
  return at::convolution(x, weight, bias, p.stride, p.padding, p.dilation, false, {0, 0}, groups);
}

// x gives its size and layout only.
inline at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const ConvParams& p,
                             int64_t groups) {
  return std::get<0>(at::convolution_backward(grad, x, weight, std::nullopt, p.stride, p.padding, p.dilation, false,
                                              {0, 0}, groups, {true, false, false}));
}

// So does weight.
inline at::Tensor grad_weight(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                              const ConvParams& p, int64_t groups) {
  // Where a CPU has no float16 arithmetic torch sums in float16: ten times the error of rounding once, at 131 images.
  if (x.is_cpu() && x.scalar_type() == at::kHalf)
    return grad_weight(grad.to(at::kFloat), x.to(at::kFloat), weight.to(at::kFloat), p, groups).to(at::kHalf);
  return std::get<1>(at::convolution_backward(grad, x, weight, std::nullopt, p.stride, p.padding, p.dilation, false,
                                              {0, 0}, groups, {false, true, false}));
}

// Whether the convolution is a product of two matrices, which the vendor's library for those computes three to ten
// times as fast: one pixel, one tap.
bool is_product(const ConvShape& shape, at::ScalarType dtype, at::Device device);

// The same three as products; weight and x are dense. Rounded in another order.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   at::MemoryFormat format);
at::Tensor product_grad_input(const at::Tensor& grad, const at::Tensor& weight, at::MemoryFormat format);
at::Tensor product_grad_weight(const at::Tensor& grad, const at::Tensor& x, at::MemoryFormat format);

}  // namespace prunekernels::vendor
