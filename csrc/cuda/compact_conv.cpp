#include "cuda/compact_conv.h"

#include <array>

#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

struct Sizes {
  int64_t groups, rows_per_group, columns;
  explicit Sizes(const DeviceMask& mask)
      : groups(mask.table()[kLiveGroups]),
        rows_per_group(mask.out().padded / groups),
        columns(mask.in().padded / groups) {}
  int64_t rows() const { return groups * rows_per_group; }
};

// The forward pass leaves it, and the backward pass takes it if it is what this plan makes of the same weight and mask:
// another plan's forward pass may have left something else, or nothing.
at::Tensor compact_weight(const CudaCall& call, const at::Tensor& weight, const Sizes& sizes) {
  at::Tensor* const copy = call.weight.packed_copy ? &call.weight.packed_copy->copy : nullptr;
  const std::array<int64_t, 4> size{sizes.rows(), sizes.columns, call.shape.R, call.shape.S};
  if (copy && copy->defined() && copy->sizes() == at::IntArrayRef(size) && copy->scalar_type() == call.dtype &&
      copy->device() == weight.device() && copy->is_contiguous(call.format))
    return *copy;
  const at::Tensor packed = packed_conv_weight(call, weight, call.mask.pack(), sizes.rows_per_group, sizes.columns);
  if (copy && !copy->defined()) *copy = packed;
  return packed;
}

}  // namespace

at::Tensor compact_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias) {
  const Sizes sizes(call.mask);
  OptionalTensor b;
  if (bias) b = picked(call.op, *bias, call.mask.out().index, sizes.rows());
  const at::Tensor y = vendor::conv(gathered(call, x, call.mask.in()), compact_weight(call, weight, sizes), b,
                                    call.params, sizes.groups);
  return scattered(call, y, call.mask.out());
}

at::Tensor compact_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const Sizes sizes(call.mask);
  const ConvShape& s = call.shape;
  const at::Tensor like_x = call.empty({s.N, call.mask.in().padded, s.H, s.W}, grad_out);
  const at::Tensor grad_x = vendor::grad_input(gathered(call, grad_out, call.mask.out()), like_x,
                                               compact_weight(call, weight, sizes), call.params, sizes.groups);
  return scattered(call, grad_x, call.mask.in());
}

at::Tensor compact_grad_weight(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& x,
                               const at::Tensor& weight, const OptionalTensor& scale) {
  const Sizes sizes(call.mask);
  const ConvShape& s = call.shape;
  const at::Tensor like = call.empty({sizes.rows(), sizes.columns, s.R, s.S}, weight);
  const at::Tensor grad = vendor::grad_weight(gathered(call, grad_out, call.mask.out()),
                                              gathered(call, x, call.mask.in()), like, call.params, sizes.groups)
                              .contiguous(call.format);
  return unpack_grad_weight(
      call, grad, element_of(call.dtype), weight, scale,
      {call.channels_last() ? PackLayout::rows : PackLayout::channels, sizes.rows_per_group, sizes.columns, 1});
}

}  // namespace prunekernels
