#include "cpu/direct_conv.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/caching_allocator.h"
#include "cpu/denormals.h"
#include "cpu/depthwise.h"
#include "cpu/direct_pixels.h"
#include "cpu/kernels/depthwise_conv.h"
#include "cpu/kernels/plane_conv.h"
#include "cpu/kernels/plane_grad_weight.h"
#include "cpu/sparse_pixels.h"
#include "cpu/tensor_access.h"
#include "cpu/workspace.h"
#include "plan/plan.h"

namespace prunekernels {
namespace {

constexpr int64_t kGrainFloats = 16 << 10;    // less than this per thread is not worth waking it
constexpr double kFilled = 1.6;               // lanes of images pay if at least 1 / kFilled of them hold something
constexpr int64_t kPartialFloats = 32 << 20;  // limit for all partial gradients together

// What a vector's lanes hold: neighbouring pixels, or the same pixel of as many images. Lanes of images need that many
// images (or bands of rows of fewer), and a transposition that pays off if several taps read each value. For the
// gradient of the weight it always does, since every tap adds into every row.
Lanes choose_lanes(const ConvShape& s, Direction direction, bool sparse) {
  const int64_t lanes = microkernels().lanes, groups = (s.N + lanes - 1) / lanes;
  const Lanes pixels{LaneAxis::pixels, 1}, images{LaneAxis::images, 1};
  if (lanes == 1 || s.taps() == 1) return pixels;
  if (!sparse) {
    const bool filled = s.N * 4 >= groups * lanes * 3, shares = groups >= at::get_num_threads() || s.Q < 14;
    return filled && (direction == Direction::grad_weight || shares) ? images : pixels;
  }
  const bool turned = direction == Direction::grad_input;
  const int64_t step = s.stride[0], rows = turned ? divide_up(s.H, step) : s.P;
  const int64_t bands = best_bands(s.N, rows, (s.R - 1) * s.dilation[0] / step, lanes);
  const int64_t filled = divide_up(s.N * bands, lanes) * lanes * divide_up(rows, bands);
  return s.N * rows * kFilled >= filled ? Lanes{LaneAxis::images, bands} : pixels;
}

at::Tensor run(const PlaneConv& conv, const at::Tensor& operand, const at::Tensor& weight, const at::Tensor* bias,
               at::IntArrayRef size) {
  const at::Tensor dense_weight = weight.contiguous(weight.suggest_memory_format());
  const int64_t block_floats = std::max<int64_t>(1, dense_weight.numel() / std::max<int64_t>(1, conv.blocks()));
  const Workspace packed(conv.weight_floats());
  at::parallel_for(
      0, conv.blocks(), std::max<int64_t>(1, kGrainFloats / block_floats), [&](int64_t begin, int64_t end) {
        conv.pack_weights(const_elements<float>(dense_weight), layout_of(dense_weight), packed.data(), begin, end);
      });
  const at::Tensor result = empty_cached(size, operand.options(), at::MemoryFormat::Contiguous);
  const float* start = bias ? const_elements<float>(*bias) : nullptr;
  at::parallel_for(0, conv.tasks(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(conv.scratch_floats());
    conv.run(const_elements<float>(operand), packed.data(), elements<float>(result), start, begin, end, scratch.data());
  });
  return result;
}

}  // namespace

at::Tensor direct_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias, bool sparse) {
  if (is_depthwise(call.shape)) return depthwise_forward(call, x, weight, bias);
  if (call.dtype == at::kBFloat16)
    return sparse ? sparse_pixels_forward(call, x, weight, bias) : pixels_forward(call, x, weight, bias);
  const ConvShape& s = call.shape;
  const PlaneConv conv(PlaneConv::kForward, s, call.mask, !sparse, choose_lanes(s, Direction::forward, sparse),
                       at::get_num_threads());
  return run(conv, x, weight, bias ? &*bias : nullptr, {s.N, s.K, s.P, s.Q});
}

at::Tensor direct_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight,
                             bool sparse) {
  if (is_depthwise(call.shape)) return depthwise_grad_input(call, grad_out, weight);
  if (call.dtype == at::kBFloat16)
    return sparse ? sparse_pixels_grad_input(call, grad_out, weight) : pixels_grad_input(call, grad_out, weight);
  const ConvShape& s = call.shape;
  const PlaneConv conv(PlaneConv::kGradInput, s, call.mask, !sparse, choose_lanes(s, Direction::grad_input, sparse),
                       at::get_num_threads());
  return run(conv, grad_out, weight, nullptr, {s.N, s.C, s.H, s.W});
}

at::Tensor direct_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale, bool sparse) {
  if (is_depthwise(call.shape)) return depthwise_grad_weight(call, grad_out, x, weight, scale);
  if (call.dtype == at::kBFloat16)
    return sparse ? sparse_pixels_grad_weight(call, grad_out, x, weight, scale)
                  : pixels_grad_weight(call, grad_out, x, weight, scale);
  const ConvShape& s = call.shape;
  const int64_t threads = at::get_num_threads();
  const PlaneGradWeight work(s, call.mask, !sparse, choose_lanes(s, Direction::grad_weight, sparse), threads);
  // Threads share out the blocks, each with a gradient of its own to add to, or else the filters.
  const int64_t floats = work.partial_floats(), fit = kPartialFloats / std::max<int64_t>(1, floats);
  const int64_t shares =
      work.stretches() >= threads ? 1 : std::clamp<int64_t>(fit, 1, std::min(threads, work.blocks()));
  const int64_t parts = (threads + shares - 1) / shares;
  const Workspace partial(shares * floats);
  at::parallel_for(0, shares * parts, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Workspace scratch(work.scratch_floats());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task / parts;
      work.run(const_elements<float>(x), const_elements<float>(grad_out), work.blocks() * share / shares,
               work.blocks() * (share + 1) / shares, task % parts, parts, partial.data() + share * floats,
               scratch.data());
    }
  });
  const at::Tensor grad = empty_cached(weight.sizes(), weight.options(), weight.suggest_memory_format());
  const int64_t row_floats = std::max<int64_t>(1, s.channels_per_group() * s.taps());
  at::parallel_for(0, s.K, std::max<int64_t>(1, kGrainFloats / row_floats), [&](int64_t begin, int64_t end) {
    work.write(partial.data(), shares, const_floats(scale), layout_of(grad), elements<float>(grad), begin, end);
  });
  return grad;
}

}  // namespace prunekernels
