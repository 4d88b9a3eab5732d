#include "cuda/dense_conv.h"

#include <ATen/ops/empty.h>

#include "cuda/kernels/nan_repair.h"
#include "cuda/plain_conv.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

at::Tensor masked_weight(const CudaCall& call, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  return packed_conv_weight(call, weight, call.mask.pack_dense(), s.K / s.G, s.C / s.G);
}

// Corrects the result of a full-width convolution where a NaN or an infinity of a dead channel leaked into it.
void repair_nan(const CudaCall& call, bool forward, const at::Tensor& operand, const at::Tensor& masked,
                const OptionalTensor& bias, const at::Tensor& result) {
  const ConvShape& s = call.shape;
  const ChannelSide& to = forward ? call.mask.out() : call.mask.in();
  const LeakSearch search{result.const_data_ptr(),
                          s.N,
                          forward ? s.out_pixels() : s.in_pixels(),
                          to.channels,
                          element_of(call.dtype),
                          call.channels_last(),
                          call.mask.sentinels(forward)};
  const int blocks = leak_blocks(search);
  if (blocks == 0) return;
  const at::Tensor found = at::empty({blocks}, result.options().dtype(at::kInt).memory_format(std::nullopt));
  PK_LAUNCH(call.op, launch_find_leaks, search, found.mutable_data_ptr<int32_t>(), device::current_stream());
  const Repair repair{s,
                      element_of(call.dtype),
                      call.channels_last(),
                      operand.const_data_ptr(),
                      masked.const_data_ptr(),
                      strides_of(masked),
                      bias ? bias->const_data_ptr() : nullptr,
                      result.mutable_data_ptr(),
                      to.slot,
                      call.mask.pairs()};
  if (forward)
    PK_LAUNCH(call.op, launch_repair_fwd, repair, found.const_data_ptr<int32_t>(), blocks, device::current_stream());
  else
    PK_LAUNCH(call.op, launch_repair_grad_input, repair, found.const_data_ptr<int32_t>(), blocks,
              device::current_stream());
}

}  // namespace

at::Tensor dense_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias) {
  if (call.dtype == at::kDouble) return plain_forward(call, x, weight, bias);
  const at::Tensor masked = masked_weight(call, weight);
  OptionalTensor live_bias;
  if (bias) live_bias = picked(call.op, *bias, call.mask.kept_filters(), call.shape.K);
  const at::Tensor y = vendor::conv(x, masked, live_bias, call.params, call.params.groups).contiguous(call.format);
  repair_nan(call, true, x, masked, live_bias, y);
  return y;
}

at::Tensor dense_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  if (call.dtype == at::kDouble) return plain_grad_input(call, grad_out, weight);
  const ConvShape& s = call.shape;
  const at::Tensor masked = masked_weight(call, weight);
  const at::Tensor like_x = call.empty({s.N, s.C, s.H, s.W}, grad_out);
  const at::Tensor grad_x =
      vendor::grad_input(grad_out, like_x, masked, call.params, call.params.groups).contiguous(call.format);
  repair_nan(call, false, grad_out, masked, std::nullopt, grad_x);
  return grad_x;
}

}  // namespace prunekernels
