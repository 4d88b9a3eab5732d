#include "cpu/compact_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/caching_allocator.h"
#include "cpu/kernels/weights.h"
#include "cpu/tensor_access.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

// Compact input and output of one chunk. Measured best of 1 to 16 MB with 2 MB of L2 per core; the vendor's per-call
// cost rules out less.
constexpr int64_t kChunkBytes = 4 << 20;

int64_t row_grain(const at::Tensor& weight) {
  return std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, weight[0].numel()));
}

}  // namespace

CompactConv::CompactConv(const ConvShape& shape, const MaskTable& mask, at::MemoryFormat format)
    : shape(shape),
      mask(mask),
      format(format),
      out(mask.out_index(), mask.out_count(), shape.K, mask[kRagged]),
      in(mask.in_index(), mask.in_count(), shape.C, mask[kRagged]),
      columns(in.list()) {}

WeightMove CompactConv::weight_move(const at::Tensor& full, const at::Tensor& compact) const {
  const bool one_list = shape.G == 1 && mask[kPairsFull] && !mask[kRagged];
  return {mask, one_list ? &columns : nullptr, layout_of(full), layout_of(compact), shape.taps()};
}

at::Tensor CompactConv::pack_weight(const at::Tensor& weight) const {
  const at::Tensor full = weight.contiguous(format);
  const at::Tensor compact =
      empty_cached({mask.out_count(), mask[kInPerGroup], shape.R, shape.S}, weight.options(), format);
  with_element(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, mask.out_count(), row_grain(compact), [&](int64_t begin, int64_t end) {
      prunekernels::pack_weight(const_elements<T>(full), elements<T>(compact), weight_move(full, compact), begin, end);
    });
  });
  return compact;
}

at::Tensor CompactConv::pack_bias(const at::Tensor& bias) const {
  const at::Tensor compact = at::empty({mask.out_count()}, bias.options());
  const at::Tensor full = bias.contiguous();
  with_element(bias.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < mask.out_count(); ++i) {
      const int32_t k = mask.out_index()[i];
      elements<T>(compact)[i] = k < 0 ? T{} : const_elements<T>(full)[k];
    }
  });
  return compact;
}

at::Tensor CompactConv::unpack_grad_weight(const at::Tensor& grad, at::IntArrayRef size, at::MemoryFormat layout,
                                           const float* scale) const {
  const at::Tensor compact =
      grad.contiguous(grad.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                         : at::MemoryFormat::Contiguous);
  const at::Tensor full = empty_cached(size, grad.options(), layout);
  with_element(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, shape.K, row_grain(full), [&](int64_t begin, int64_t end) {
      prunekernels::unpack_grad_weight(const_elements<T>(compact), elements<T>(full), weight_move(full, compact), scale,
                                       begin, end);
    });
  });
  return full;
}

int64_t CompactConv::chunk(int64_t element_bytes) const {
  const int64_t image = (mask.in_count() * shape.in_pixels() + mask.out_count() * shape.out_pixels()) * element_bytes;
  const int64_t fit = std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(1, image), 1, shape.N);
  const int64_t chunks = (shape.N + fit - 1) / fit, threads = at::get_num_threads();
  // Chunks of equal size, as many as make whole rounds of the threads: 16 images as 5 + 5 + 5 + 1 would leave threads
  // idle in every round.
  return std::min(shape.N, ((shape.N + chunks - 1) / chunks + threads - 1) / threads * threads);
}

namespace {

template <typename Step>
void each_chunk(int64_t images, int64_t chunk, Step step) {
  for (int64_t first = 0; first < images; first += chunk) step(first, std::min(chunk, images - first));
}

// images first..first + count of x, gathered into buffer; as they are where every channel is live.
at::Tensor gather_images(const ChannelMap& map, const at::Tensor& x, int64_t first, int64_t count,
                         const at::Tensor& buffer) {
  const at::Tensor images = x.narrow(0, first, count);
  if (map.identity()) return images;
  const at::Tensor compact = buffer.narrow(0, 0, count);
  map.gather(images, compact);
  return compact;
}

}  // namespace

at::Tensor compact_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias) {
  const ConvShape& s = call.shape;
  const CompactConv cc(s, call.mask, call.format);
  const int64_t groups = call.mask[kLiveGroups], chunk = cc.out.identity() ? s.N : cc.chunk(x.element_size());
  const at::Tensor w = cc.pack_weight(weight);
  const OptionalTensor b = bias ? OptionalTensor(cc.pack_bias(*bias)) : std::nullopt;
  const at::Tensor buffer = cc.in.identity() ? x : call.empty({chunk, cc.in.live(), s.H, s.W}, x);
  if (cc.out.identity()) return vendor::conv(gather_images(cc.in, x, 0, s.N, buffer), w, b, call.params, groups);
  const at::Tensor y = empty_cached({s.N, s.K, s.P, s.Q}, x.options(), call.format);
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor part = vendor::conv(gather_images(cc.in, x, first, count, buffer), w, b, call.params, groups);
    cc.out.scatter(part.contiguous(call.format), y.narrow(0, first, count));
  });
  return y;
}

at::Tensor compact_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const CompactConv cc(s, call.mask, call.format);
  const int64_t groups = call.mask[kLiveGroups], chunk = cc.in.identity() ? s.N : cc.chunk(grad_out.element_size());
  const at::Tensor w = cc.pack_weight(weight);
  const at::Tensor buffer = cc.out.identity() ? grad_out : call.empty({chunk, cc.out.live(), s.P, s.Q}, grad_out);
  const at::Tensor x = vendor::sizes_only({chunk, cc.in.live(), s.H, s.W}, grad_out.options(), call.format);
  if (cc.in.identity())
    return vendor::grad_input(gather_images(cc.out, grad_out, 0, s.N, buffer), x, w, call.params, groups);
  const at::Tensor grad_x = empty_cached({s.N, s.C, s.H, s.W}, grad_out.options(), call.format);
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor grad = gather_images(cc.out, grad_out, first, count, buffer);
    const at::Tensor part = vendor::grad_input(grad, x.narrow(0, 0, count), w, call.params, groups);
    cc.in.scatter(part.contiguous(call.format), grad_x.narrow(0, first, count));
  });
  return grad_x;
}

at::Tensor compact_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                               const at::Tensor& weight, const OptionalTensor& scale) {
  const ConvShape& s = call.shape;
  const CompactConv cc(s, call.mask, call.format);
  const int64_t groups = call.mask[kLiveGroups];
  const bool copies = !cc.in.identity() || !cc.out.identity();
  // Each chunk adds a whole weight gradient: worth it only while that is small beside the chunk.
  const int64_t weight_bytes = call.mask.out_count() * call.mask[kInPerGroup] * s.taps() * x.element_size();
  const int64_t chunk = !copies ? s.N : std::min(s.N, cc.chunk(x.element_size()) * (1 + weight_bytes / (1 << 20)));
  const at::Tensor x_buffer = cc.in.identity() ? x : call.empty({chunk, cc.in.live(), s.H, s.W}, x);
  const at::Tensor grad_buffer = cc.out.identity() ? grad_out : call.empty({chunk, cc.out.live(), s.P, s.Q}, x);
  const at::Tensor like =
      vendor::sizes_only({call.mask.out_count(), call.mask[kInPerGroup], s.R, s.S}, x.options(), call.format);
  at::Tensor sum;
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor part =
        vendor::grad_weight(gather_images(cc.out, grad_out, first, count, grad_buffer),
                            gather_images(cc.in, x, first, count, x_buffer), like, call.params, groups);
    const bool widen = count < s.N && part.element_size() < 4;  // a sum of many chunks needs the wider type
    if (!sum.defined())
      sum = widen ? part.to(at::kFloat) : part;
    else
      sum.add_(part);
  });
  return cc.unpack_grad_weight(sum.to(x.scalar_type()), weight.sizes(), weight.suggest_memory_format(),
                               const_floats(scale));
}

}  // namespace prunekernels
