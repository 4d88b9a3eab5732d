#include "cpu/depthwise.h"

#include <ATen/Parallel.h>

#include "cpu/caching_allocator.h"
#include "cpu/channel_map.h"
#include "cpu/denormals.h"
#include "cpu/kernels/depthwise_conv.h"
#include "cpu/kernels/depthwise_pixels.h"
#include "cpu/tensor_access.h"
#include "cpu/workspace.h"

namespace prunekernels {
namespace {

at::Tensor run_planes(const ConvCall<MaskTable>& call, DepthwiseConv::Direction direction, const at::Tensor& operand,
                      const at::Tensor& kernels, const float* bias, at::IntArrayRef size) {
  const DepthwiseConv conv(direction, call.shape, call.mask, at::get_num_threads());
  const at::Tensor result = empty_cached(size, operand.options(), call.format);
  at::parallel_for(0, conv.tasks(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(conv.scratch_floats());
    for (int64_t task = begin; task < end; ++task)
      conv.run(const_elements<float>(operand), const_elements<float>(kernels), elements<float>(result), bias, task,
               scratch.data());
  });
  return result;
}

at::Tensor run_pixels(const ConvCall<MaskTable>& call, DepthwiseConv::Direction direction, const at::Tensor& operand,
                      const at::Tensor& kernels, const float* bias, at::IntArrayRef size) {
  const ChannelMap channels(call.mask.out_index(), call.mask.out_count(), call.shape.K, false);
  const DepthwisePixels conv(direction, call.shape, channels.list(), at::get_num_threads());
  const Workspace packed(conv.weight_floats());
  conv.pack_weights(const_elements<float>(kernels), bias, packed.data());
  const at::Tensor result = empty_cached(size, operand.options(), call.format);
  at::parallel_for(0, conv.tasks(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(conv.scratch_floats());
    conv.clear(scratch.data());
    for (int64_t task = begin; task < end; ++task)
      conv.run(const_elements<float>(operand), packed.data(), elements<float>(result), task, scratch.data());
  });
  return result;
}

at::Tensor run(const ConvCall<MaskTable>& call, DepthwiseConv::Direction direction, const at::Tensor& operand,
               const at::Tensor& weight, const float* bias, at::IntArrayRef size) {
  const at::Tensor kernels = weight.contiguous();
  return (call.channels_last() ? run_pixels : run_planes)(call, direction, operand, kernels, bias, size);
}

template <typename Work>
void write_gradient(const Work& work, const Workspace& partial, const OptionalTensor& scale, const at::Tensor& grad) {
  work.write(partial.data(), const_floats(scale), elements<float>(grad));
}

void planes_grad_weight(const ConvCall<MaskTable>& call, const float* grad_out, const float* x,
                        const OptionalTensor& scale, const at::Tensor& grad) {
  const DepthwiseGradWeight work(call.shape, call.mask, at::get_num_threads());
  const Workspace partial(work.partial_floats());
  at::parallel_for(0, work.tasks(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(work.scratch_floats());
    for (int64_t task = begin; task < end; ++task) work.run(x, grad_out, task, partial.data(), scratch.data());
  });
  write_gradient(work, partial, scale, grad);
}

void pixels_grad_weight(const ConvCall<MaskTable>& call, const float* grad_out, const float* x,
                        const OptionalTensor& scale, const at::Tensor& grad) {
  const ChannelMap channels(call.mask.out_index(), call.mask.out_count(), call.shape.K, false);
  const DepthwisePixelsGradWeight work(call.shape, channels.list(), at::get_num_threads());
  const Workspace partial(work.partial_floats());
  at::parallel_for(0, work.shares(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(work.scratch_floats());
    for (int64_t share = begin; share < end; ++share) work.run(x, grad_out, share, partial.data(), scratch.data());
  });
  write_gradient(work, partial, scale, grad);
}

}  // namespace

bool depthwise_serves(const PlanCase& c) { return is_depthwise(c.shape) && c.dtype == at::kFloat; }

// What takes the time is memory, not multiply-adds: what is read of the operands and written of the result. Pixels are
// read and written whole. The shares are ours of the vendor's time, where all channels are live.
double depthwise_cost(Plan plan, const PlanCase& c) {
  constexpr double kPlane = 0.8, kZero = 0.5, kPixel = 0.4, kLiveOfPixel = 0.6;
  const ConvShape& s = c.shape;
  const double elements = static_cast<double>(s.N) * (s.in_pixels() + s.out_pixels()) * kMultiplyAddsPerElement;
  const double all = static_cast<double>(s.C), live = static_cast<double>(c.mask.out_count());
  if (plan == Plan::dense) return elements * all;
  if (plan == Plan::compact) return elements * live + elements_copied(s, c.mask, c.direction) * kMultiplyAddsPerElement;
  if (c.format == at::MemoryFormat::ChannelsLast) return elements * (kPixel * all + kLiveOfPixel * live);
  const double of_result = c.direction == Direction::grad_weight ? 0 : 0.5;  // about
  return elements * (kPlane * live + kZero * of_result * (all - live));
}

at::Tensor depthwise_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias) {
  const ConvShape& s = call.shape;
  return run(call, DepthwiseConv::kForward, x, weight, const_floats(bias), {s.N, s.K, s.P, s.Q});
}

at::Tensor depthwise_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  return run(call, DepthwiseConv::kGradInput, grad_out, weight, nullptr, {s.N, s.C, s.H, s.W});
}

at::Tensor depthwise_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                 const at::Tensor& weight, const OptionalTensor& scale) {
  const at::Tensor grad = empty_cached(weight.sizes(), weight.options(), at::MemoryFormat::Contiguous);
  (call.channels_last() ? pixels_grad_weight : planes_grad_weight)(call, const_elements<float>(grad_out),
                                                                   const_elements<float>(x), scale, grad);
  return grad.contiguous(weight.suggest_memory_format());
}

}  // namespace prunekernels
