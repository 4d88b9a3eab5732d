// The pieces of the compact plan on CPU: live lists as channel maps, packed weights, and the batch chunks that keep
// copies in cache.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/channel_map.h"
#include "cpu/kernels/weights.h"
#include "ops/conv_args.h"

namespace prunekernels {

struct CompactConv {
  CompactConv(const ConvShape& shape, const MaskTable& mask, at::MemoryFormat format);
  CompactConv(const CompactConv&) = delete;  // columns points into in

  at::Tensor pack_weight(const at::Tensor& weight) const;  // [K, Cg, R, S] -> [out_count, in_per_group, R, S]
  at::Tensor pack_bias(const at::Tensor& bias) const;      // [K] -> [out_count]
  // [out_count, in_per_group, R, S] -> size [K, Cg, R, S] in a format, rows scaled, exact zeros for dead kernels.
  at::Tensor unpack_grad_weight(const at::Tensor& compact, at::IntArrayRef size, at::MemoryFormat layout,
                                const float* scale) const;

  int64_t chunk(int64_t element_bytes) const;  // images per batch chunk
  at::Tensor buffer(const at::Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width) const;

  const ConvShape& shape;
  const MaskTable& mask;
  at::MemoryFormat format;
  ChannelMap out, in;
  ChannelList columns;  // in, as the weight kernels take it

 private:
  WeightMove weight_move(const at::Tensor& full, const at::Tensor& compact) const;
};

// images first..first+count of x, gathered into buffer (or as they are, where every channel is live).
at::Tensor gather_images(const ChannelMap& map, const at::Tensor& x, int64_t first, int64_t count,
                         const at::Tensor& buffer);

}  // namespace prunekernels
