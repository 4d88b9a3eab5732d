// The steps that the plans of a device share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cuda/device_mask.h"
#include "ops/conv_args.h"

namespace prunekernels {

using CudaCall = ConvCall<DeviceMask>;

Element element_of(at::ScalarType type);  // not of double, which no kernel computes in
bool runs_tf32(const CudaCall& call);     // a convolution of floats computed in tf32

// The weight, or a copy whose taps lie evenly apart; any other strides serve.
at::Tensor even_weight(const at::Tensor& weight);
WeightStrides strides_of(const at::Tensor& weight);

struct PackedAs {
  PackLayout layout;
  int64_t rows_per_group, columns;
  int64_t elements(const CudaCall& call, const PackMask& mask) const {
    return mask.live_groups * rows_per_group * columns * call.shape.taps();
  }
};
// Each [live_groups * rows, R * S, columns] in the order of the layout, as one row of elements. In one launch.
std::vector<at::Tensor> packed_weights(const CudaCall& call, const at::Tensor& weight, const PackMask& mask,
                                       c10::ArrayRef<PackedAs> wanted, bool tf32);
// The same, as the weight of a convolution in the call's format: [live_groups * rows, columns, R, S].
at::Tensor packed_conv_weight(const CudaCall& call, const at::Tensor& weight, const PackMask& mask,
                              int64_t rows_per_group, int64_t columns);

// How a weight gradient was computed: slices to be added, each [live_groups * rows_per_group, R * S, columns] in the
// order of the layout.
struct PackedGrad {
  PackLayout layout;
  int64_t rows_per_group, columns, slices;
};
// -> the layout of like [K, C / G, R, S]: exact zeros for dead kernels, rows times scale.
at::Tensor unpack_grad_weight(const CudaCall& call, const at::Tensor& packed, Element element, const at::Tensor& like,
                              const OptionalTensor& scale, const PackedGrad& grad);
// The same, written to all of full.
void unpack_grad_weight_into(const CudaCall& call, const at::Tensor& packed, Element element, const at::Tensor& full,
                             const OptionalTensor& scale, const PackedGrad& grad);

// [full] -> [count], 0 where index[j] < 0; index on the device
at::Tensor picked(const char* op, const at::Tensor& values, const int32_t* index, int64_t count);

// Activations [N, channels, ...] <-> [N, padded, ...]; the tensor itself where the side is an identity.
at::Tensor gathered(const CudaCall& call, const at::Tensor& full, const ChannelSide& side);
at::Tensor scattered(const CudaCall& call, const at::Tensor& compact, const ChannelSide& side);

// In place: the output of a live filter without live kernels is its bias, or 0 without one.
void write_constants(const CudaCall& call, const at::Tensor& y, const OptionalTensor& bias);

// In place on a gradient dense in either format: 0 where dead, rows times scale. Null mask: nothing is dead.
void mask_grad_weight(const char* op, const at::Tensor& grad, const DeviceMask* mask, const OptionalTensor& scale);

// [N, K, P, Q] -> [K], 0 where the filter is dead. Null mask: nothing is dead.
at::Tensor channel_sums(const char* op, const at::Tensor& x, const DeviceMask* mask);

}  // namespace prunekernels
