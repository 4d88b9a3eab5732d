// What every masked convolution operator checks and derives first, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/ArrayRef.h>

#include <optional>

#include "core/conv_shape.h"
#include "core/mask_table.h"
#include "ops/aside.h"

namespace prunekernels {

using OptionalTensor = std::optional<at::Tensor>;

struct ConvParams {  // as the operators receive them
  c10::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// What is known of the weight that a plan gets.
struct WeightFacts {
  bool is_own = false;                // a copy, of which nobody else knows
  bool dead_are_zero = false;         // those filters, channels and kernels
  at::Tensor* masked_copy = nullptr;  // where to leave a copy with zeros in what is dead, if one is made
  PackedCopy* packed_copy = nullptr;  // forward: where to leave what is packed for both passes; then: that, if any
};

// One call of a masked convolution operator, as every plan takes it. Mask: how the device's plans read a mask table.
template <typename Mask>
struct ConvCall {
  const char* op;
  const ConvShape& shape;
  const ConvParams& params;
  const Mask& mask;
  at::MemoryFormat format;  // of both activations, which are dense in it
  at::ScalarType dtype;
  WeightFacts weight = {};
  bool operand_is_finite = false;  // known to be, wherever a window has it

  bool channels_last() const { return format == at::MemoryFormat::ChannelsLast; }
  at::Tensor empty(at::IntArrayRef size, const at::Tensor& like) const {
    return at::empty(size, like.options().memory_format(format));
  }
};

// Sizes of the problem, checked; x_size is [N, C, H, W], weight [K, C / groups, R, S].
ConvShape make_shape(const char* op, c10::IntArrayRef x_size, const at::Tensor& weight, const ConvParams& params);

void check_dtype(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& like);
void check_grad_out(const char* op, const at::Tensor& grad_out, const ConvShape& shape);
void check_scale(const char* op, const std::optional<at::Tensor>& scale, int64_t K, at::Device device);

// A mask table in three steps, for a device whose tables the host cannot read: the tensor, its words, their sizes.
void check_table_tensor(const char* op, const char* argument, const at::Tensor& mask, at::Device device);
void check_table_words(const char* op, const char* argument, const int32_t* words, int64_t count);
void check_table_sizes(const char* op, const char* argument, const MaskTable& table, int64_t K, int64_t C, int64_t G);
void check_table_filters(const char* op, const char* argument, const MaskTable& table, int64_t K);

// The host view of a mask table on the CPU for these sizes; empty where there is none.
std::optional<MaskTable> read_mask(const char* op, const char* argument, const std::optional<at::Tensor>& mask,
                                   int64_t K, int64_t C, int64_t G);

// The same where only the number of filters is known.
std::optional<MaskTable> read_filter_mask(const char* op, const char* argument, const std::optional<at::Tensor>& mask,
                                          int64_t K);

}  // namespace prunekernels
