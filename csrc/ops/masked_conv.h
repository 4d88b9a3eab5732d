// The masked convolution and its gradients, as all devices do them: check the arguments, return early where nothing is
// to be computed, choose a plan, run it. What differs is a template argument:
//
//   struct Device {
//     using Mask = ...;  // a mask table as the device's plans read it; a pointer or an optional to it is empty without
//                        // a mask, and may be empty where nothing is dead
//     static auto read_mask(op, argument, table, shape, like);   // checked; on the device of `like`
//     static auto read_filter_mask(op, argument, table, filters, like);
//     static const MaskTable& table(const Mask&);                // its words, on the host
//     static auto plans(const Mask&, at::Device);                // a PlanDevice
//     // A weight that is kept in float32, as a plan of activations in fewer bits reads it: in their dtype, dead
//     filters
//     // zeros or, unless `whole`, anything; null mask: nothing is dead. And the gradient back in float32.
//     static at::Tensor narrowed(weight, dtype, format, const Mask*, whole);
//     static at::Tensor widened(grad, weight, const Mask*);
//     static bool shows_finite(grad_weight, s);  // of the whole convolution: that grad_out is, where a window has it
//   };
//
// and overloads for ConvCall<Mask>, whose activations are dense in call.format, and whose results are:
//
//   {dense,compact,direct}_forward(call, x, weight, bias)
//   {dense,compact,direct}_grad_input(call, grad_out, weight)
//   {compact,direct}_grad_weight(call, grad_out, x, weight, scale)
//   mask_grad_weight(op, grad, mask, scale)  // in place: 0 where dead, rows times scale; null mask: nothing is dead
//   write_constants(call, y, bias)           // in place: the outputs of live filters without live kernels
//   channel_sums(op, x, mask)                // [N, K, P, Q] -> [K], 0 where the filter is dead
//
// direct_* run the plans direct and sparse, and have one argument more: sparse.
#pragma once

#include <ATen/DeviceGuard.h>

#include "check.h"
#include "ops/aside.h"
#include "ops/conv_args.h"
#include "ops/vendor_conv.h"
#include "plan/plan_choice.h"

namespace prunekernels {

inline at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  return at::empty(sizes, options.memory_format(format)).zero_();  // at::zeros forgets the format
}

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

// A weight has the dtype of the activations, or stays in float32 where those have 16 bits.
inline void check_weight_dtype(const char* op, const at::Tensor& weight, const at::Tensor& x) {
  const bool stays =
      weight.scalar_type() == at::kFloat && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
  check_dtype(op, "weight", weight, stays ? weight : x);
  if (stays) PK_CHECK(weight.device() == x.device(), op, "weight", x.device(), weight.device());
}

// Sizes and layout of weight in the dtype of x; never read or written.
inline at::Tensor weight_like(const at::Tensor& weight, const at::Tensor& x) {
  if (weight.scalar_type() == x.scalar_type()) return weight;
  return at::empty(weight.sizes(), x.options().memory_format(weight.suggest_memory_format()));
}

// Null mask: nothing is dead. finite: where to tell whether grad_out is, or null.
template <typename Device>
at::Tensor dense_grad_weight(const char* op, const ConvShape& s, const at::Tensor& grad_out, const at::Tensor& x,
                             const at::Tensor& weight, const typename Device::Mask* mask, const ConvParams& params,
                             const OptionalTensor& scale, IsFinite* finite) {
  const at::MemoryFormat format = weight.suggest_memory_format();
  const auto run = [&] {
    if (mask && vendor::is_product(s, x.scalar_type(), x.device()))
      return vendor::product_grad_weight(grad_out, x, format);
    const at::Tensor like = weight.contiguous(x.suggest_memory_format());
    return vendor::grad_weight(grad_out, x, like, params, params.groups).contiguous(format);
  };
  const at::Tensor grad = run();
  if (finite) finite->known = Device::shows_finite(grad, s);
  mask_grad_weight(op, grad, mask, scale);
  return grad;
}

template <typename Device>
at::Tensor operand_weight(const ConvCall<typename Device::Mask>& call, const at::Tensor& weight, Plan plan) {
  if (weight.scalar_type() == call.dtype) return weight;
  return Device::narrowed(weight, call.dtype, call.format, &call.mask, plan == Plan::dense);
}

template <typename Device>
at::Tensor choose_and_run(const ConvCall<typename Device::Mask>& call, const PlanRequest& asked, Direction direction,
                          at::Device device, c10::function_ref<at::Tensor(Plan)> run) {
  return with_plan(Device::plans(call.mask, device), asked,
                   {call.shape, Device::table(call.mask), direction, call.dtype, call.format}, run);
}

template <typename Device>
at::Tensor masked_conv2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mask_table, const OptionalTensor& grad_mask,
                         const OptionalTensor& grad_scale, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d";
  const at::DeviceGuard guard(x.device());
  const ConvParams params{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_weight_dtype(op, weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, params);
  if (bias) {
    check_dtype(op, "bias", *bias, x);
    PK_CHECK(bias->dim() == 1 && bias->size(0) == s.K, op, "bias", "[" + std::to_string(s.K) + "]", bias->sizes());
  }
  const auto mask = Device::read_mask(op, "mask", mask_table, s, x);
  if (!(grad_mask && mask_table && grad_mask->is_same(*mask_table)))
    Device::read_mask(op, "grad_mask", grad_mask, s, x);  // checked, and known before the backward pass
  check_scale(op, grad_scale, s.K, x.device());
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = x.suggest_memory_format();
  if (s.N == 0) return at::empty({0, s.K, s.P, s.Q}, x.options().memory_format(format));
  const at::Tensor dense_x = x.contiguous(format);
  if (!mask || asked.settled(Device::table(*mask))) {
    const at::Tensor w = Device::narrowed(weight, x.scalar_type(), format, nullptr, true);
    return vendor::conv(dense_x, w, bias, params, groups).contiguous(format);
  }

  auto* const kept = Aside<MaskedCopy>::find(weight);
  auto* const packed = Aside<PackedCopy>::find(weight);
  const WeightFacts facts{weight.scalar_type() != x.scalar_type(), false, kept ? &kept->copy : nullptr, packed};
  const ConvCall<typename Device::Mask> call{op, s, params, *mask, format, x.scalar_type(), facts};
  const OptionalTensor dense_bias = contiguous(bias);
  const auto run = [&](Plan plan) {
    const at::Tensor w = operand_weight<Device>(call, weight, plan);
    switch (plan) {
      case Plan::compact:
        return compact_forward(call, dense_x, w, dense_bias);
      case Plan::direct:
      case Plan::sparse:
        return direct_forward(call, dense_x, w, dense_bias, plan == Plan::sparse);
      default:
        const at::Tensor y = dense_forward(call, dense_x, w, dense_bias);
        if (!dense_bias) write_constants(call, y, dense_bias);  // the other plans have written zeros there
        return y;
    }
  };
  const bool nothing_live = Device::table(*mask)[kLivePairs] == 0;
  const at::Tensor y = nothing_live ? zeros({s.N, s.K, s.P, s.Q}, x.options(), format)
                                    : choose_and_run<Device>(call, asked, Direction::forward, x.device(), run);
  if (dense_bias) write_constants(call, y, dense_bias);
  return y;
}

template <typename Device>
at::Tensor masked_conv2d_grad_input(const at::Tensor& grad_out, const at::Tensor& weight,
                                    const OptionalTensor& mask_table, at::IntArrayRef x_size, bool channels_last,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d_grad_input";
  const at::DeviceGuard guard(grad_out.device());
  const ConvParams params{stride, padding, dilation, groups};
  check_dtype(op, "grad_out", grad_out, grad_out);
  check_weight_dtype(op, weight, grad_out);
  const ConvShape s = make_shape(op, x_size, weight, params);
  check_grad_out(op, grad_out, s);
  const auto mask = Device::read_mask(op, "mask", mask_table, s, grad_out);
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (s.N == 0 || (mask && Device::table(*mask)[kLivePairs] == 0)) return zeros(x_size, grad_out.options(), format);
  const at::Tensor grad = grad_out.contiguous(format);
  if (!mask || asked.settled(Device::table(*mask))) {
    const at::Tensor like_x = vendor::sizes_only(x_size, grad.options(), format);
    const at::Tensor w = Device::narrowed(weight, grad.scalar_type(), format, nullptr, true);
    return vendor::grad_input(grad, like_x, w, params, groups).contiguous(format);
  }

  auto* const packed = Aside<PackedCopy>::find(weight);
  const WeightFacts facts{weight.scalar_type() != grad.scalar_type(), Aside<DeadAreZero>::find(weight) != nullptr,
                          nullptr, packed};
  const IsFinite* const finite = Aside<IsFinite>::find(grad_out);
  const ConvCall<typename Device::Mask> call{
      op, s, params, *mask, format, grad.scalar_type(), facts, finite && finite->known};
  const auto run = [&](Plan plan) {
    const at::Tensor w = operand_weight<Device>(call, weight, plan);
    switch (plan) {
      case Plan::compact:
        return compact_grad_input(call, grad, w);
      case Plan::direct:
      case Plan::sparse:
        return direct_grad_input(call, grad, w, plan == Plan::sparse);
      default:
        return dense_grad_input(call, grad, w);
    }
  };
  return choose_and_run<Device>(call, asked, Direction::grad_input, grad.device(), run);
}

template <typename Device>
at::Tensor masked_conv2d_grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                                     const OptionalTensor& mask_table, const OptionalTensor& grad_scale,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, std::string_view plan) {
  using Mask = typename Device::Mask;
  constexpr const char* op = "masked_conv2d_grad_weight";
  const at::DeviceGuard guard(x.device());
  const ConvParams params{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_dtype(op, "grad_out", grad_out, x);
  check_weight_dtype(op, weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, params);
  check_grad_out(op, grad_out, s);
  const auto mask = Device::read_mask(op, "mask", mask_table, s, x);
  check_scale(op, grad_scale, s.K, x.device());
  const PlanRequest asked = read_plan(op, plan);

  if (s.N == 0 || (mask && Device::table(*mask)[kLivePairs] == 0))
    return zeros(weight.sizes(), weight.options(), weight.suggest_memory_format());
  const OptionalTensor scale = contiguous(grad_scale);
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor dense_x = x.contiguous(format), grad = grad_out.contiguous(format);
  const at::Tensor like = weight_like(weight, x);
  IsFinite* const finite = Aside<IsFinite>::find(grad_out);
  if (!mask || asked.settled(Device::table(*mask)))
    return Device::widened(dense_grad_weight<Device>(op, s, grad, dense_x, like, nullptr, params, scale, finite),
                           weight, nullptr);

  const ConvCall<Mask> call{op, s, params, *mask, format, x.scalar_type()};
  const auto grad_of = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_grad_weight(call, grad, dense_x, like, scale);
      case Plan::direct:
      case Plan::sparse:
        return direct_grad_weight(call, grad, dense_x, like, scale, plan == Plan::sparse);
      default:
        return dense_grad_weight<Device>(op, s, grad, dense_x, like, &*mask, params, scale, finite);
    }
  };
  const auto run = [&](Plan plan) { return Device::widened(grad_of(plan), weight, &*mask); };
  return choose_and_run<Device>(call, asked, Direction::grad_weight, x.device(), run);
}

template <typename Device>
at::Tensor masked_conv2d_grad_bias(const at::Tensor& grad_out, const OptionalTensor& mask_table) {
  constexpr const char* op = "masked_conv2d_grad_bias";
  const at::DeviceGuard guard(grad_out.device());
  check_dtype(op, "grad_out", grad_out, grad_out);
  PK_CHECK(grad_out.dim() == 4, op, "grad_out", "a 4-D tensor [N, K, P, Q]", grad_out.sizes());
  const auto mask = Device::read_filter_mask(op, "mask", mask_table, grad_out.size(1), grad_out);
  return channel_sums(op, grad_out, mask ? &*mask : nullptr);
}

}  // namespace prunekernels
