// One call of an operator on the device, as every plan takes it, and the steps that plans share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda/device_mask.h"
#include "ops/conv_args.h"

namespace prunekernels {

using OptionalTensor = std::optional<at::Tensor>;

struct ConvCall {
  const char* op;
  const ConvShape& shape;
  const ConvParams& params;
  const MaskMirror& mask;
  at::MemoryFormat format;  // of both activations, which are dense in it
  at::ScalarType dtype;     // float, bfloat16 or half: double goes its own way

  bool channels_last() const { return format == at::MemoryFormat::ChannelsLast; }
  Element element() const;
  bool tf32() const;                                                     // a float computed as such
  at::Tensor empty(at::IntArrayRef size, const at::Tensor& like) const;  // in the format
};

Element element_of(at::ScalarType type);

// The weight, or a copy whose taps lie evenly apart; any other strides serve.
at::Tensor even_weight(const at::Tensor& weight);
WeightStrides strides_of(const at::Tensor& weight);

// [live_groups * rows, R * S, columns] in the order of the layout, as one row of elements.
at::Tensor packed_weight(const ConvCall& call, const at::Tensor& weight, const PackMask& mask, PackLayout layout,
                         int64_t rows_per_group, int64_t columns, bool tf32);
// The same, as the weight of a convolution in the call's format: [live_groups * rows, columns, R, S].
at::Tensor packed_conv_weight(const ConvCall& call, const at::Tensor& weight, const PackMask& mask,
                              int64_t rows_per_group, int64_t columns);

// How a weight gradient was computed: slices to be added, each [live_groups * rows_per_group, R * S, columns] in the
// order of the layout.
struct PackedGrad {
  PackLayout layout;
  int64_t rows_per_group, columns, slices;
};
// -> the layout of like [K, C / G, R, S]: exact zeros for dead kernels, rows times scale.
at::Tensor unpacked_grad_weight(const ConvCall& call, const at::Tensor& packed, Element element, const at::Tensor& like,
                                const OptionalTensor& scale, const PackedGrad& grad);
// The same, written to all of full.
void write_grad_weight(const ConvCall& call, const at::Tensor& packed, Element element, const at::Tensor& full,
                       const OptionalTensor& scale, const PackedGrad& grad);

// [full] -> [count], 0 where index[j] < 0; index on the device
at::Tensor picked(const char* op, const at::Tensor& values, const int32_t* index, int64_t count);

// Activations [N, channels, ...] <-> [N, padded, ...]; the tensor itself where the side is an identity.
at::Tensor gathered(const ConvCall& call, const at::Tensor& full, const Side& side);
at::Tensor scattered(const ConvCall& call, const at::Tensor& compact, const Side& side);

// In place: live filters without live kernels give their bias, or 0.
void write_constants(const ConvCall& call, const at::Tensor& y, const OptionalTensor& bias);

// In place on a gradient dense in either format: 0 where dead, rows times scale. Null mask: all live.
void mask_grad_weight(const char* op, const at::Tensor& grad, const MaskMirror* mask, const OptionalTensor& scale);

}  // namespace prunekernels
