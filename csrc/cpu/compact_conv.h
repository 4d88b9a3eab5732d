// The compact plan on CPU: gather live channels, the vendor's convolution of the live sizes, scatter with zeros; in
// batch chunks, so that the copies stay in cache.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/channel_map.h"
#include "cpu/kernels/weights.h"
#include "ops/conv_args.h"

namespace prunekernels {

at::Tensor compact_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias);
at::Tensor compact_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight);
at::Tensor compact_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                               const at::Tensor& weight, const OptionalTensor& scale);

// The live sizes of a masked convolution: its lists as channel maps, and its weights in and out of them.
struct CompactConv {
  CompactConv(const ConvShape& shape, const MaskTable& mask, at::MemoryFormat format);
  CompactConv(const CompactConv&) = delete;  // columns points into in

  at::Tensor pack_weight(const at::Tensor& weight) const;  // [K, Cg, R, S] -> [out_count, in_per_group, R, S]
  at::Tensor pack_bias(const at::Tensor& bias) const;      // [K] -> [out_count]
  // [out_count, in_per_group, R, S] -> size [K, Cg, R, S] in a format: exact zeros for dead kernels, rows times scale.
  at::Tensor unpack_grad_weight(const at::Tensor& compact, at::IntArrayRef size, at::MemoryFormat layout,
                                const float* scale) const;

  int64_t chunk(int64_t element_bytes) const;  // images per batch chunk

  const ConvShape& shape;
  const MaskTable& mask;
  at::MemoryFormat format;
  ChannelMap out, in;
  ChannelList columns;  // in, as the weight kernels take it

 private:
  WeightMove weight_move(const at::Tensor& full, const at::Tensor& compact) const;
};

}  // namespace prunekernels
