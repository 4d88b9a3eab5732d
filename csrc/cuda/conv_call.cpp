#include "cuda/conv_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>

#include "cuda/kernels/channel_copy.h"
#include "cuda/kernels/mask_grad.h"
#include "cuda/plain_conv.h"

namespace prunekernels {
namespace {

int32_t small(int64_t size) { return static_cast<int32_t>(size); }

ChannelCopy channel_copy(const CudaCall& call, const at::Tensor& full, const ChannelSide& side) {
  return {full.size(0), full.size(2) * full.size(3),           side.channels,
          side.padded,  static_cast<int>(full.element_size()), call.channels_last(),
          side.granule};
}

}  // namespace

Element element_of(at::ScalarType type) {
  return type == at::kBFloat16 ? Element::bf16 : type == at::kHalf ? Element::f16 : Element::f32;
}

bool runs_tf32(const CudaCall& call) { return call.dtype == at::kFloat && device::allows_tf32(); }

at::Tensor even_weight(const at::Tensor& weight) {
  const bool even = weight.size(2) == 1 || weight.size(3) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  return even ? weight : weight.contiguous();
}

WeightStrides strides_of(const at::Tensor& weight) {
  return {weight.stride(0), weight.stride(1), weight.size(3) == 1 ? weight.stride(2) : weight.stride(3)};
}

std::vector<at::Tensor> packed_weights(const CudaCall& call, const at::Tensor& weight, const PackMask& mask,
                                       c10::ArrayRef<PackedAs> wanted, bool tf32) {
  const at::Tensor full = even_weight(weight);
  std::vector<at::Tensor> packed;
  std::vector<PackJob> jobs;
  for (const PackedAs& as : wanted) {
    const int64_t elements = as.elements(call, mask);
    packed.push_back(at::empty({elements}, weight.options().memory_format(at::MemoryFormat::Contiguous)));
    jobs.push_back({mask, small(call.shape.taps()), as.layout, small(as.rows_per_group), small(as.columns),
                    strides_of(full), element_of(call.dtype), full.const_data_ptr(), packed.back().mutable_data_ptr()});
  }
  PK_LAUNCH(call.op, launch_pack_weights, jobs.data(), static_cast<int64_t>(jobs.size()), element_of(call.dtype), tf32,
            device::current_stream());
  return packed;
}

at::Tensor packed_conv_weight(const CudaCall& call, const at::Tensor& weight, const PackMask& mask,
                              int64_t rows_per_group, int64_t columns) {
  const auto layout = call.channels_last() ? PackLayout::rows : PackLayout::channels;
  const at::Tensor packed = packed_weights(call, weight, mask, PackedAs{layout, rows_per_group, columns}, false)[0];
  const int64_t rows = mask.live_groups * rows_per_group, R = call.shape.R, S = call.shape.S;
  return call.channels_last() ? packed.view({rows, R, S, columns}).permute({0, 3, 1, 2})
                              : packed.view({rows, columns, R, S});
}

at::Tensor unpack_grad_weight(const CudaCall& call, const at::Tensor& packed, Element element, const at::Tensor& like,
                              const OptionalTensor& scale, const PackedGrad& grad) {
  const at::Tensor full = at::empty(like.sizes(), like.options().memory_format(like.suggest_memory_format()));
  unpack_grad_weight_into(call, packed, element, full, scale, grad);
  return full;
}

void unpack_grad_weight_into(const CudaCall& call, const at::Tensor& packed, Element element, const at::Tensor& full,
                             const OptionalTensor& scale, const PackedGrad& grad) {
  const PackMask mask = call.mask.pack();
  const int64_t taps = call.shape.taps();
  const UnpackJob job{mask,
                      small(taps),
                      grad.layout,
                      small(grad.rows_per_group),
                      small(grad.columns),
                      strides_of(full),
                      small(grad.slices),
                      mask.live_groups * grad.rows_per_group * taps * grad.columns,
                      element,
                      packed.const_data_ptr(),
                      scale ? scale->const_data_ptr<float>() : nullptr,
                      full.mutable_data_ptr()};
  PK_LAUNCH(call.op, launch_unpack_grad_weight, &job, 1, element_of(call.dtype), device::current_stream());
}

at::Tensor picked(const char* op, const at::Tensor& values, const int32_t* index, int64_t count) {
  const at::Tensor full = values.contiguous(), chosen = at::empty({count}, values.options());
  PK_LAUNCH(op, launch_gather_channels, full.const_data_ptr(), index, chosen.mutable_data_ptr(),
            {1, 1, full.numel(), count, static_cast<int>(full.element_size()), false}, device::current_stream());
  return chosen;
}

at::Tensor gathered(const CudaCall& call, const at::Tensor& full, const ChannelSide& side) {
  if (side.identity) return full;
  const at::Tensor compact = call.empty({full.size(0), side.padded, full.size(2), full.size(3)}, full);
  PK_LAUNCH(call.op, launch_gather_channels, full.const_data_ptr(), side.index, compact.mutable_data_ptr(),
            channel_copy(call, full, side), device::current_stream());
  return compact;
}

at::Tensor scattered(const CudaCall& call, const at::Tensor& result, const ChannelSide& side) {
  const at::Tensor compact = result.contiguous(call.format);
  if (side.identity) return compact;
  const at::Tensor full = call.empty({compact.size(0), side.channels, compact.size(2), compact.size(3)}, compact);
  PK_LAUNCH(call.op, launch_scatter_channels, compact.const_data_ptr(), side.slot, full.mutable_data_ptr(),
            channel_copy(call, full, side), device::current_stream());
  return full;
}

void write_constants(const CudaCall& call, const at::Tensor& y, const OptionalTensor& bias) {
  const int64_t count = call.mask.table()[kConstants];
  if (count == 0) return;
  const at::Tensor list = call.mask.constants();
  if (!bias) {
    y.index_fill_(1, list, 0);
  } else {
    const at::Tensor values = bias->index_select(0, list).view({1, count, 1, 1});
    y.index_copy_(1, list, values.expand({y.size(0), count, y.size(2), y.size(3)}));
  }
}

void mask_grad_weight(const char* op, const at::Tensor& grad, const DeviceMask* mask, const OptionalTensor& scale) {
  if (!mask && !scale) return;
  if (grad.scalar_type() == at::kDouble) return mask_grad_of_doubles(grad, mask, scale);
  const bool last = grad.is_contiguous(at::MemoryFormat::ChannelsLast) && !grad.is_contiguous();
  MaskGradLayer layer{};
  layer.mask = {nullptr, nullptr, small(grad.size(0)), small(grad.size(1)), small(grad.size(2) * grad.size(3)), last};
  if (mask) layer.mask.out_slot = mask->out().slot, layer.mask.pairs = mask->pairs();
  layer.grad = grad.mutable_data_ptr();
  layer.grad_scale = scale ? scale->const_data_ptr<float>() : nullptr;
  PK_LAUNCH(op, launch_mask_grad, element_of(grad.scalar_type()), &layer, 1, false, device::current_stream());
}

at::Tensor channel_sums(const char* op, const at::Tensor& x, const DeviceMask* mask) {
  const at::Tensor sums = at::sum(x, {0, 2, 3});
  return mask && x.size(1) ? picked(op, sums, mask->kept_filters(), x.size(1)) : sums;
}

}  // namespace prunekernels
