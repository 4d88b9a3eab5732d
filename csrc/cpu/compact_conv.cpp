#include "cpu/compact_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/caching_allocator.h"
#include "cpu/kernels/weights.h"
#include "cpu/tensor_access.h"

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
  const at::Tensor compact = fresh({mask.out_count(), mask[kInPerGroup], shape.R, shape.S}, weight.options(), format);
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
  const at::Tensor full = fresh(size, grad.options(), layout);
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
  // Equal chunks, whole rounds of the threads: 16 images as 5 + 5 + 5 + 1 leave threads idle four times.
  return std::min(shape.N, ((shape.N + chunks - 1) / chunks + threads - 1) / threads * threads);
}

at::Tensor CompactConv::buffer(const at::Tensor& like, int64_t images, int64_t channels, int64_t height,
                               int64_t width) const {
  return at::empty({images, channels, height, width}, like.options().memory_format(format));
}

at::Tensor gather_images(const ChannelMap& map, const at::Tensor& x, int64_t first, int64_t count,
                         const at::Tensor& buffer) {
  const at::Tensor images = x.narrow(0, first, count);
  if (map.identity()) return images;
  const at::Tensor compact = buffer.narrow(0, 0, count);
  map.gather(images, compact);
  return compact;
}

}  // namespace prunekernels
