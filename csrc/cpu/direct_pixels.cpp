#include "cpu/direct_pixels.h"

#include "cpu/kernels/pixel_conv.h"
#include "cpu/kernels/pixel_grad_weight.h"
#include "cpu/pixel_runs.h"

namespace prunekernels {

bool pixels_serve(const PlanCase& c) {
  if (c.dtype != at::kBFloat16 || c.format != at::MemoryFormat::ChannelsLast) return false;
  return c.mask[kPairsFull] && !c.mask[kRagged] && PixelConv::serves(c.shape);
}

at::Tensor pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias) {
  const ConvShape& s = call.shape;
  const PixelLists lists(call.mask);
  const PixelConv conv(PixelConv::kForward, s, nullptr, whole_blocks(call.mask.out_count(), call.mask.in_count()),
                       lists.filters, lists.channels, at::get_num_threads());
  return run_conv(conv, x, weight, bias ? &*bias : nullptr, lists.filters, {s.N, s.K, s.P, s.Q});
}

at::Tensor pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const PixelLists lists(call.mask);
  const PixelConv conv(PixelConv::kGradInput, s, nullptr, whole_blocks(call.mask.in_count(), call.mask.out_count()),
                       lists.filters, lists.channels, at::get_num_threads());
  return run_conv(conv, grad_out, weight, nullptr, lists.channels, {s.N, s.C, s.H, s.W});
}

at::Tensor pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale) {
  const PixelLists lists(call.mask);
  return run_grad_weight(PixelGradWeight(call.shape, nullptr, lists.filters, lists.channels), grad_out, x, weight,
                         scale);
}

}  // namespace prunekernels
