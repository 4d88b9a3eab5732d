// How the plans for pixels (NHWC, bfloat16) run their kernels: memory, threads, and the mask's lists.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/caching_allocator.h"
#include "cpu/channel_map.h"
#include "cpu/tensor_access.h"
#include "cpu/workspace.h"
#include "ops/conv_args.h"

namespace prunekernels {

struct PixelLists {
  explicit PixelLists(const MaskTable& mask)
      : out(mask.out_index(), mask.out_count(), mask[kFilters], false),
        in(mask.in_index(), mask.in_count(), mask[kChannels], false),
        filters(out.list()),
        channels(in.list()) {}
  const ChannelMap out, in;
  const ChannelList filters, channels;
};

inline const uint16_t* const_pixels(const at::Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
inline uint16_t* pixels(const at::Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

constexpr int64_t kPackGrain = 16 << 10;  // words of packed weights; less is not worth waking a thread

// The result of a convolution, or of its gradient of the input. bias: null for none.
template <typename Conv>
at::Tensor run_conv(const Conv& conv, const at::Tensor& operand, const at::Tensor& weight, const at::Tensor* bias,
                    const ChannelList& results, at::IntArrayRef size) {
  const auto floats_of = [](int64_t elements) { return (elements + 1) / 2; };
  std::vector<float> start(conv.width());
  for (int64_t i = 0; bias && i < results.live; ++i)
    start[conv.place(i)] = static_cast<float>(const_elements<BFloat16>(*bias)[results.index[i]]);
  const at::Tensor rows = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const Workspace packed(conv.weight_words());
  auto* const words = reinterpret_cast<uint32_t*>(packed.data());
  const int64_t piece = std::max<int64_t>(1, conv.weight_words() / std::max<int64_t>(1, conv.packs()));
  at::parallel_for(0, conv.packs(), std::max<int64_t>(1, kPackGrain / piece), [&](int64_t begin, int64_t end) {
    const Workspace scratch(floats_of(conv.pack_scratch()));
    conv.pack_weights(const_pixels(rows), words, begin, end, reinterpret_cast<uint16_t*>(scratch.data()));
  });
  const at::Tensor result = empty_cached(size, operand.options(), at::MemoryFormat::ChannelsLast);
  at::parallel_for(0, conv.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(floats_of(conv.scratch_elements()));
    for (int64_t task = begin; task < end; ++task)
      conv.run(const_pixels(operand), words, start.data(), pixels(result), task,
               reinterpret_cast<uint16_t*>(scratch.data()));
  });
  return result;
}

// The gradient of the weight: each thread sums up that of some blocks.
template <typename GradWeight>
at::Tensor run_grad_weight(const GradWeight& work, const at::Tensor& grad_out, const at::Tensor& x,
                           const at::Tensor& weight, const OptionalTensor& scale) {
  constexpr int64_t kPartialFloats = 32 << 20;  // limit for all partial gradients together
  const int64_t floats = work.partial_floats(), fit = kPartialFloats / std::max<int64_t>(1, floats);
  const int64_t shares =
      std::clamp<int64_t>(fit, 1, std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, work.blocks())));
  const Workspace partial(shares * floats);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(work.scratch_words());
    for (int64_t share = begin; share < end; ++share) {
      float* const sums = partial.data() + share * floats;
      std::fill(sums, sums + floats, 0.0f);
      work.run(const_pixels(x), const_pixels(grad_out), work.blocks() * share / shares,
               work.blocks() * (share + 1) / shares, sums, reinterpret_cast<uint32_t*>(scratch.data()));
    }
  });
  const at::Tensor grad = empty_cached(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  const int64_t filters = weight.size(0), row = std::max<int64_t>(1, weight.numel() / filters);
  at::parallel_for(0, filters, std::max<int64_t>(1, kPackGrain / row), [&](int64_t begin, int64_t end) {
    work.write(partial.data(), shares, const_floats(scale), pixels(grad), begin, end);
  });
  return grad.contiguous(weight.suggest_memory_format());
}

}  // namespace prunekernels
