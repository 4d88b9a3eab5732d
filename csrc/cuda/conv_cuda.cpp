// The masked convolution and its gradients on the device: checks, the plans of each, and which of them runs.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "check.h"
#include "cuda/compact_conv.h"
#include "cuda/dense_conv.h"
#include "cuda/direct_conv.h"
#include "cuda/plain_conv.h"
#include "cuda/plans_cuda.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  return at::empty(sizes, options.memory_format(format)).zero_();  // at::zeros forgets the format
}

at::MemoryFormat format_if(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

bool nothing_live(const MaskMirror* mask) { return mask && mask->table()[kLivePairs] == 0; }

at::Tensor choose_and_run(const ConvCall& call, const PlanRequest& asked, Direction direction,
                          c10::function_ref<at::Tensor(Plan)> run, at::Device device) {
  return with_plan(DevicePlans(call.mask, device), asked,
                   {call.shape, call.mask.table(), direction, call.dtype, call.format}, run);
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

at::Tensor masked_conv2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mask_table, const OptionalTensor& grad_mask,
                         const OptionalTensor& grad_scale, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d";
  const at::DeviceGuard guard(x.device());
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_dtype(op, "weight", weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, p);
  if (bias) {
    check_dtype(op, "bias", *bias, x);
    PK_CHECK(bias->dim() == 1 && bias->size(0) == s.K, op, "bias", "[" + std::to_string(s.K) + "]", bias->sizes());
  }
  const auto mask = mirror_mask(op, "mask", mask_table, s.K, s.C, s.G, x);
  if (!(grad_mask && mask_table && grad_mask->is_same(*mask_table)))
    mirror_mask(op, "grad_mask", grad_mask, s.K, s.C, s.G, x);  // checked, and known before the backward pass
  check_scale(op, grad_scale, s.K, x.device());
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = x.suggest_memory_format();
  if (s.N == 0) return at::empty({0, s.K, s.P, s.Q}, x.options().memory_format(format));
  const at::Tensor full_x = x.contiguous(format);
  if (!mask) return vendor::conv(full_x, weight.contiguous(format), bias, p, groups).contiguous(format);

  const ConvCall call{op, s, p, *mask, format, x.scalar_type()};
  const OptionalTensor full_bias = contiguous(bias);
  at::Tensor y;
  if (nothing_live(mask.get())) {
    y = zeros({s.N, s.K, s.P, s.Q}, x.options(), format);
  } else if (x.scalar_type() == at::kDouble) {
    y = PlainConv{&*mask_table, s, p, format}.forward(full_x, weight, full_bias);
  } else {
    const auto run = [&](Plan plan) {
      switch (plan) {
        case Plan::compact:
          return compact_forward(call, full_x, weight, full_bias);
        case Plan::direct:
        case Plan::sparse:
          return own_forward(call, full_x, weight, full_bias, plan == Plan::sparse);
        default:
          return dense_forward(call, full_x, weight, full_bias);
      }
    };
    y = choose_and_run(call, asked, Direction::forward, run, x.device());
  }
  write_constants(call, y, full_bias);
  return y;
}

at::Tensor masked_conv2d_grad_input(const at::Tensor& grad_out, const at::Tensor& weight,
                                    const OptionalTensor& mask_table, at::IntArrayRef x_size, bool channels_last,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d_grad_input";
  const at::DeviceGuard guard(grad_out.device());
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "grad_out", grad_out, grad_out);
  check_dtype(op, "weight", weight, grad_out);
  const ConvShape s = make_shape(op, x_size, weight, p);
  check_grad_out(op, grad_out, s);
  const auto mask = mirror_mask(op, "mask", mask_table, s.K, s.C, s.G, grad_out);
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = format_if(channels_last);
  if (s.N == 0 || nothing_live(mask.get())) return zeros(x_size, grad_out.options(), format);
  const at::Tensor grad = grad_out.contiguous(format);
  if (!mask) {
    const at::Tensor like_x = at::empty(x_size, grad.options().memory_format(format));
    return vendor::grad_input(grad, like_x, weight.contiguous(format), p, groups).contiguous(format);
  }
  if (grad.scalar_type() == at::kDouble) return PlainConv{&*mask_table, s, p, format}.grad_input(grad, weight);

  const ConvCall call{op, s, p, *mask, format, grad.scalar_type()};
  const auto run = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_grad_input(call, grad, weight);
      case Plan::direct:
      case Plan::sparse:
        return own_grad_input(call, grad, weight, plan == Plan::sparse);
      default:
        return dense_grad_input(call, grad, weight);
    }
  };
  return choose_and_run(call, asked, Direction::grad_input, run, grad.device());
}

at::Tensor masked_conv2d_grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                                     const OptionalTensor& mask_table, const OptionalTensor& grad_scale,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d_grad_weight";
  const at::DeviceGuard guard(x.device());
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_dtype(op, "grad_out", grad_out, x);
  check_dtype(op, "weight", weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, p);
  check_grad_out(op, grad_out, s);
  const auto mask = mirror_mask(op, "mask", mask_table, s.K, s.C, s.G, x);
  check_scale(op, grad_scale, s.K, x.device());
  const PlanRequest asked = read_plan(op, plan);

  const OptionalTensor scale = contiguous(grad_scale);
  const at::MemoryFormat format = x.suggest_memory_format();
  if (s.N == 0 || nothing_live(mask.get()))
    return zeros(weight.sizes(), weight.options(), weight.suggest_memory_format());
  const at::Tensor full_x = x.contiguous(format), grad = grad_out.contiguous(format);
  if (x.scalar_type() == at::kDouble)
    return PlainConv{mask ? &*mask_table : nullptr, s, p, format}.grad_weight(grad, full_x, weight, scale);
  if (!mask) return dense_grad_weight(op, grad, full_x, weight, nullptr, p, scale);

  const ConvCall call{op, s, p, *mask, format, x.scalar_type()};
  const auto run = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_grad_weight(call, grad, full_x, weight, scale);
      case Plan::direct:
      case Plan::sparse:
        return own_grad_weight(call, grad, full_x, weight, scale, plan == Plan::sparse);
      default:
        return dense_grad_weight(op, grad, full_x, weight, mask.get(), p, scale);
    }
  };
  return choose_and_run(call, asked, Direction::grad_weight, run, x.device());
}

at::Tensor masked_conv2d_grad_bias(const at::Tensor& grad_out, const OptionalTensor& mask_table) {
  constexpr const char* op = "masked_conv2d_grad_bias";
  const at::DeviceGuard guard(grad_out.device());
  check_dtype(op, "grad_out", grad_out, grad_out);
  PK_CHECK(grad_out.dim() == 4, op, "grad_out", "a 4-D tensor [N, K, P, Q]", grad_out.sizes());
  const int64_t K = grad_out.size(1);
  const auto mask = mirror_mask(op, "mask", mask_table, K, -1, -1, grad_out);
  const at::Tensor sums = at::sum(grad_out, {0, 2, 3});
  return mask && K ? picked(op, sums, mask->kept_filters(), K) : sums;
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("masked_conv2d", masked_conv2d);
  m.impl("masked_conv2d_grad_input", masked_conv2d_grad_input);
  m.impl("masked_conv2d_grad_weight", masked_conv2d_grad_weight);
  m.impl("masked_conv2d_grad_bias", masked_conv2d_grad_bias);
}

}  // namespace prunekernels
