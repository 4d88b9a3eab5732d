#include "cpu/sparse_pixels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/caching_allocator.h"
#include "cpu/channel_map.h"
#include "cpu/kernels/quad_conv.h"
#include "cpu/kernels/quad_grad_weight.h"
#include "cpu/tensor_access.h"
#include "cpu/workspace.h"

namespace prunekernels {
namespace {

constexpr int64_t kPackGrain = 16 << 10;      // words of packed weights; less is not worth waking a thread
constexpr int64_t kPartialFloats = 32 << 20;  // limit for all partial gradients together

struct Lists {
  explicit Lists(const MaskTable& mask)
      : out(mask.out_index(), mask.out_count(), mask[kFilters], false),
        in(mask.in_index(), mask.in_count(), mask[kChannels], false),
        filters(out.list()),
        channels(in.list()) {}
  const ChannelMap out, in;
  const ChannelList filters, channels;
};

int64_t floats_of(int64_t elements) { return (elements + 1) / 2; }

const uint16_t* const_pixels(const at::Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* pixels(const at::Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

at::Tensor run(const QuadConv& conv, const at::Tensor& operand, const at::Tensor& weight,
               const std::vector<float>& start, at::IntArrayRef size) {
  const at::Tensor rows = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const Workspace packed(conv.weight_words());
  auto* const words = reinterpret_cast<uint32_t*>(packed.data());
  const int64_t piece = std::max<int64_t>(1, conv.weight_words() / conv.packs());
  at::parallel_for(0, conv.packs(), std::max<int64_t>(1, kPackGrain / piece),
                   [&](int64_t begin, int64_t end) { conv.pack_weights(const_pixels(rows), words, begin, end); });
  const at::Tensor result = empty_cached(size, operand.options(), at::MemoryFormat::ChannelsLast);
  at::parallel_for(0, conv.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(floats_of(conv.scratch_elements()));
    for (int64_t task = begin; task < end; ++task)
      conv.run(const_pixels(operand), words, start.data(), pixels(result), task,
               reinterpret_cast<uint16_t*>(scratch.data()));
  });
  return result;
}

}  // namespace

bool sparse_pixels_serve(const PlanCase& c) {
  return c.dtype == at::kBFloat16 && c.format == at::MemoryFormat::ChannelsLast && c.shape.G == 1 &&
         !c.mask[kPairsFull];
}

at::Tensor sparse_pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias) {
  const ConvShape& s = call.shape;
  const Lists lists(call.mask);
  const QuadConv conv(QuadConv::kForward, s, call.mask, lists.filters, lists.channels, at::get_num_threads());
  std::vector<float> start(conv.quads() * kQuad);
  for (int64_t i = 0; bias && i < lists.filters.live; ++i)
    start[i] = static_cast<float>(const_elements<at::BFloat16>(*bias)[lists.filters.index[i]]);
  return run(conv, x, weight, start, {s.N, s.K, s.P, s.Q});
}

at::Tensor sparse_pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out,
                                    const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const Lists lists(call.mask);
  const QuadConv conv(QuadConv::kGradInput, s, call.mask, lists.filters, lists.channels, at::get_num_threads());
  return run(conv, grad_out, weight, std::vector<float>(conv.quads() * kQuad), {s.N, s.C, s.H, s.W});
}

at::Tensor sparse_pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                     const at::Tensor& weight, const OptionalTensor& scale) {
  const ConvShape& s = call.shape;
  const Lists lists(call.mask);
  const int64_t threads = at::get_num_threads();
  const QuadGradWeight work(s, call.mask, lists.filters, lists.channels, threads);
  const int64_t floats = work.partial_floats(), fit = kPartialFloats / std::max<int64_t>(1, floats);
  const int64_t shares = std::clamp<int64_t>(fit, 1, std::min(threads, work.blocks()));
  const Workspace partial(shares * floats);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(floats_of(work.scratch_elements()));
    for (int64_t share = begin; share < end; ++share) {
      float* const sums = partial.data() + share * floats;
      std::fill(sums, sums + floats, 0.0f);
      work.run(const_pixels(x), const_pixels(grad_out), work.blocks() * share / shares,
               work.blocks() * (share + 1) / shares, sums, reinterpret_cast<uint16_t*>(scratch.data()));
    }
  });
  const at::Tensor grad = empty_cached(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  const int64_t row = std::max<int64_t>(1, s.channels_per_group() * s.taps());
  at::parallel_for(0, s.K, std::max<int64_t>(1, kPackGrain / row), [&](int64_t begin, int64_t end) {
    work.write(partial.data(), shares, const_floats(scale), pixels(grad), begin, end);
  });
  return grad.contiguous(weight.suggest_memory_format());
}

}  // namespace prunekernels
