// The masked convolution and its gradients on CPU: checks, the plans of each, and which of them runs.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "cpu/caching_allocator.h"
#include "cpu/compact_conv.h"
#include "cpu/dense_conv.h"
#include "cpu/direct_conv.h"
#include "cpu/plans_cpu.h"
#include "ops/conv_args.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  return at::empty(sizes, options.memory_format(format)).zero_();  // at::zeros forgets the format
}

template <typename Step>
void each_chunk(int64_t images, int64_t chunk, Step step) {
  for (int64_t first = 0; first < images; first += chunk) step(first, std::min(chunk, images - first));
}

at::Tensor compact_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const CompactConv& cc, const ConvParams& p) {
  const ConvShape& s = cc.shape;
  const int64_t groups = cc.mask[kLiveGroups], chunk = cc.out.identity() ? s.N : cc.chunk(x.element_size());
  const at::Tensor w = cc.pack_weight(weight);
  const OptionalTensor b = bias ? OptionalTensor(cc.pack_bias(*bias)) : std::nullopt;
  const at::Tensor buffer = cc.in.identity() ? x : cc.buffer(x, chunk, cc.in.live(), s.H, s.W);
  if (cc.out.identity()) return vendor::conv(gather_images(cc.in, x, 0, s.N, buffer), w, b, p, groups);
  const at::Tensor y = fresh({s.N, s.K, s.P, s.Q}, x.options(), cc.format);
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor part = vendor::conv(gather_images(cc.in, x, first, count, buffer), w, b, p, groups);
    cc.out.scatter(part.contiguous(cc.format), y.narrow(0, first, count));
  });
  return y;
}

at::Tensor compact_grad_input(const at::Tensor& grad_out, const at::Tensor& weight, const CompactConv& cc,
                              const ConvParams& p) {
  const ConvShape& s = cc.shape;
  const int64_t groups = cc.mask[kLiveGroups], chunk = cc.in.identity() ? s.N : cc.chunk(grad_out.element_size());
  const at::Tensor w = cc.pack_weight(weight);
  const at::Tensor buffer = cc.out.identity() ? grad_out : cc.buffer(grad_out, chunk, cc.out.live(), s.P, s.Q);
  const at::Tensor x = cc.buffer(grad_out, chunk, cc.in.live(), s.H, s.W);  // sizes only; never read, so never paged in
  if (cc.in.identity()) return vendor::grad_input(gather_images(cc.out, grad_out, 0, s.N, buffer), x, w, p, groups);
  const at::Tensor grad_x = fresh({s.N, s.C, s.H, s.W}, grad_out.options(), cc.format);
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor grad = gather_images(cc.out, grad_out, first, count, buffer);
    const at::Tensor part = vendor::grad_input(grad, x.narrow(0, 0, count), w, p, groups);
    cc.in.scatter(part.contiguous(cc.format), grad_x.narrow(0, first, count));
  });
  return grad_x;
}

at::Tensor compact_grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                               const CompactConv& cc, const ConvParams& p, const float* scale) {
  const ConvShape& s = cc.shape;
  const int64_t groups = cc.mask[kLiveGroups];
  const bool copies = !cc.in.identity() || !cc.out.identity();
  // Each chunk adds a whole weight gradient: worth it only while that is small beside the chunk.
  const int64_t weight_bytes = cc.mask.out_count() * cc.mask[kInPerGroup] * s.taps() * x.element_size();
  const int64_t chunk = !copies ? s.N : std::min(s.N, cc.chunk(x.element_size()) * (1 + weight_bytes / (1 << 20)));
  const at::Tensor x_buffer = cc.in.identity() ? x : cc.buffer(x, chunk, cc.in.live(), s.H, s.W);
  const at::Tensor grad_buffer = cc.out.identity() ? grad_out : cc.buffer(x, chunk, cc.out.live(), s.P, s.Q);
  const at::Tensor like =
      at::empty({cc.mask.out_count(), cc.mask[kInPerGroup], s.R, s.S}, x.options().memory_format(cc.format));
  at::Tensor sum;
  each_chunk(s.N, chunk, [&](int64_t first, int64_t count) {
    const at::Tensor part = vendor::grad_weight(gather_images(cc.out, grad_out, first, count, grad_buffer),
                                                gather_images(cc.in, x, first, count, x_buffer), like, p, groups);
    if (!sum.defined())
      sum = count < s.N && part.element_size() < 4 ? part.to(at::kFloat)
                                                   : part;  // a sum of many chunks needs the wider type
    else
      sum.add_(part);
  });
  return cc.unpack_grad_weight(sum.to(x.scalar_type()), weight.sizes(), weight.suggest_memory_format(), scale);
}

Side filters(const MaskTable& mask) { return {mask.out_slot(), mask[kFilters]}; }
Side channels(const MaskTable& mask) { return {mask.in_slot(), mask[kChannels]}; }

at::Tensor dense_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const MaskTable& mask, const ConvParams& p) {
  const at::MemoryFormat format = x.suggest_memory_format();
  if (mask.nothing_dead()) return vendor::conv(x, weight.contiguous(format), bias, p, p.groups).contiguous(format);
  const at::Tensor w = masked_weight(weight, mask, format);
  const OptionalTensor b = bias ? OptionalTensor(masked_bias(*bias, mask)) : std::nullopt;
  at::Tensor y = vendor::conv(x, w, b, p, p.groups).contiguous(format);
  if (!nothing_leaked(x, y, channels(mask), filters(mask), p.groups)) {
    y = vendor::conv(without_dead_channels(x, mask.in_slot()), w, b, p, p.groups).contiguous(format);
    zero_dead_channels_(y, mask.out_slot());
  } else if (p.groups > 1) {
    zero_dead_channels_(y, mask.out_slot());
  }
  return y;
}

at::Tensor dense_grad_input(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                            const MaskTable& mask, const ConvParams& p) {
  const at::MemoryFormat format = x.suggest_memory_format();
  if (mask.nothing_dead())
    return vendor::grad_input(grad_out, x, weight.contiguous(format), p, p.groups).contiguous(format);
  const at::Tensor w = masked_weight(weight, mask, format);
  at::Tensor grad_x = vendor::grad_input(grad_out, x, w, p, p.groups).contiguous(format);
  if (!nothing_leaked(grad_out, grad_x, filters(mask), channels(mask), p.groups)) {
    grad_x = vendor::grad_input(without_dead_channels(grad_out, mask.out_slot()), x, w, p, p.groups).contiguous(format);
    zero_dead_channels_(grad_x, mask.in_slot());
  } else if (p.groups > 1) {
    zero_dead_channels_(grad_x, mask.in_slot());
  }
  return grad_x;
}

at::Tensor dense_grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                             const MaskTable* mask, const ConvParams& p, const float* scale) {
  const at::Tensor full = weight.contiguous(x.suggest_memory_format());
  const at::Tensor grad_weight =
      vendor::grad_weight(grad_out, x, full, p, p.groups).contiguous(weight.suggest_memory_format());
  mask_grad_weight_(grad_weight, mask, scale);
  return grad_weight;
}

at::Tensor masked_conv2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mask_table, const OptionalTensor& grad_mask,
                         const OptionalTensor& grad_scale, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d";
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_dtype(op, "weight", weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, p);
  if (bias) {
    check_dtype(op, "bias", *bias, x);
    PK_CHECK(bias->dim() == 1 && bias->size(0) == s.K, op, "bias", "[" + std::to_string(s.K) + "]", bias->sizes());
  }
  const auto mask = read_mask(op, "mask", mask_table, s.K, s.C, s.G);
  read_mask(op, "grad_mask", grad_mask, s.K, s.C, s.G);
  check_scale(op, grad_scale, s.K);
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = x.suggest_memory_format();
  if (s.N == 0) return at::empty({0, s.K, s.P, s.Q}, x.options().memory_format(format));
  const at::Tensor full_x = x.contiguous(format);
  if (!mask || asked.settled(*mask))
    return vendor::conv(full_x, weight.contiguous(format), bias, p, groups).contiguous(format);

  const OptionalTensor full_bias = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const auto run = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_forward(full_x, weight, full_bias, CompactConv(s, *mask, format), p);
      case Plan::direct:
      case Plan::sparse:
        return direct_forward(full_x, weight, full_bias, s, *mask, plan == Plan::sparse);
      default:
        return dense_forward(full_x, weight, full_bias, *mask, p);
    }
  };
  const PlanCase what{s, *mask, Direction::forward, x.scalar_type(), format};
  const bool empty = (*mask)[kLivePairs] == 0;
  const at::Tensor y = empty ? zeros({s.N, s.K, s.P, s.Q}, x.options(), format) : with_plan(asked, what, run);
  if ((*mask)[kConstants]) write_constant_channels_(y, mask->out_slot(), full_bias ? &*full_bias : nullptr);
  return y;
}

at::Tensor masked_conv2d_grad_input(const at::Tensor& grad_out, const at::Tensor& weight,
                                    const OptionalTensor& mask_table, at::IntArrayRef x_size, bool channels_last,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d_grad_input";
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "grad_out", grad_out, grad_out);
  check_dtype(op, "weight", weight, grad_out);
  const ConvShape s = make_shape(op, x_size, weight, p);
  check_grad_out(op, grad_out, s);
  const auto mask = read_mask(op, "mask", mask_table, s.K, s.C, s.G);
  const PlanRequest asked = read_plan(op, plan);

  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (s.N == 0 || (mask && (*mask)[kLivePairs] == 0)) return zeros(x_size, grad_out.options(), format);
  const at::Tensor grad = grad_out.contiguous(format);
  const auto like_x = [&] { return at::empty(x_size, grad.options().memory_format(format)); };  // sizes only
  if (!mask || asked.settled(*mask))
    return vendor::grad_input(grad, like_x(), weight.contiguous(format), p, groups).contiguous(format);

  const auto run = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_grad_input(grad, weight, CompactConv(s, *mask, format), p);
      case Plan::direct:
      case Plan::sparse:
        return direct_grad_input(grad, weight, s, *mask, plan == Plan::sparse);
      default:
        return dense_grad_input(grad, like_x(), weight, *mask, p);
    }
  };
  return with_plan(asked, {s, *mask, Direction::grad_input, grad.scalar_type(), format}, run);
}

at::Tensor masked_conv2d_grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                                     const OptionalTensor& mask_table, const OptionalTensor& grad_scale,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, std::string_view plan) {
  constexpr const char* op = "masked_conv2d_grad_weight";
  const ConvParams p{stride, padding, dilation, groups};
  check_dtype(op, "x", x, x);
  check_dtype(op, "grad_out", grad_out, x);
  check_dtype(op, "weight", weight, x);
  const ConvShape s = make_shape(op, x.sizes(), weight, p);
  check_grad_out(op, grad_out, s);
  const auto mask = read_mask(op, "mask", mask_table, s.K, s.C, s.G);
  check_scale(op, grad_scale, s.K);
  const PlanRequest asked = read_plan(op, plan);

  const at::Tensor scale_tensor = grad_scale ? grad_scale->contiguous() : at::Tensor();
  const float* scale = grad_scale ? scale_tensor.const_data_ptr<float>() : nullptr;
  const at::MemoryFormat format = x.suggest_memory_format();
  if (s.N == 0 || (mask && (*mask)[kLivePairs] == 0))
    return zeros(weight.sizes(), weight.options(), weight.suggest_memory_format());
  const at::Tensor full_x = x.contiguous(format), grad = grad_out.contiguous(format);
  if (!mask || asked.settled(*mask)) return dense_grad_weight(grad, full_x, weight, nullptr, p, scale);

  const auto run = [&](Plan plan) {
    switch (plan) {
      case Plan::compact:
        return compact_grad_weight(grad, full_x, weight, CompactConv(s, *mask, format), p, scale);
      case Plan::direct:
      case Plan::sparse:
        return direct_grad_weight(grad, full_x, weight, s, *mask, scale, plan == Plan::sparse);
      default:
        return dense_grad_weight(grad, full_x, weight, &*mask, p, scale);
    }
  };
  return with_plan(asked, {s, *mask, Direction::grad_weight, x.scalar_type(), format}, run);
}

at::Tensor masked_conv2d_grad_bias(const at::Tensor& grad_out, const OptionalTensor& mask_table) {
  constexpr const char* op = "masked_conv2d_grad_bias";
  check_dtype(op, "grad_out", grad_out, grad_out);
  PK_CHECK(grad_out.dim() == 4, op, "grad_out", "a 4-D tensor [N, K, P, Q]", grad_out.sizes());
  const auto mask = read_filter_mask(op, "mask", mask_table, grad_out.size(1));
  return channel_sums(grad_out.contiguous(grad_out.suggest_memory_format()), mask ? mask->out_slot() : nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("masked_conv2d", masked_conv2d);
  m.impl("masked_conv2d_grad_input", masked_conv2d_grad_input);
  m.impl("masked_conv2d_grad_weight", masked_conv2d_grad_weight);
  m.impl("masked_conv2d_grad_bias", masked_conv2d_grad_bias);
}

}  // namespace prunekernels
