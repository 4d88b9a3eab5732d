#include "cuda/dense_conv.h"

#include "cuda/kernels/nan_repair.h"
#include "cuda/plain_conv.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

at::Tensor masked_weight(const CudaCall& call, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  if (call.weight.dead_are_zero) return even_weight(weight.contiguous(call.format));
  return packed_conv_weight(call, weight, call.mask.pack_dense(), s.K / s.G, s.C / s.G);
}

// Corrects the result of a full-width convolution where a NaN or an infinity of a dead channel leaked into it.
void repair_nan(const CudaCall& call, bool forward, const at::Tensor& operand, const at::Tensor& masked,
                const OptionalTensor& bias, const at::Tensor& result) {
  const SentinelChannels& sentinels = call.mask.sentinels(forward);
  if (sentinels.count == 0 || call.operand_is_finite) return;
  const Repair repair{call.shape,
                      element_of(call.dtype),
                      call.channels_last(),
                      operand.const_data_ptr(),
                      masked.const_data_ptr(),
                      strides_of(masked),
                      bias ? bias->const_data_ptr() : nullptr,
                      result.mutable_data_ptr(),
                      (forward ? call.mask.out() : call.mask.in()).slot,
                      call.mask.pairs(),
                      sentinels};
  if (forward)
    PK_LAUNCH(call.op, launch_repair_fwd, repair, device::current_stream());
  else
    PK_LAUNCH(call.op, launch_repair_grad_input, repair, device::current_stream());
}

}  // namespace

at::Tensor dense_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias) {
  if (call.dtype == at::kDouble) return plain_forward(call, x, weight, bias);
  const at::Tensor masked = masked_weight(call, weight);
  if (call.weight.masked_copy) *call.weight.masked_copy = masked;  // the backward pass takes it as it is
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
