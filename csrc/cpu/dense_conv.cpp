#include "cpu/dense_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/caching_allocator.h"
#include "cpu/kernels/channels.h"
#include "cpu/kernels/weights.h"
#include "cpu/tensor_access.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

constexpr int64_t kGrainBytes = 32 << 10;  // less than this per thread is not worth waking it

int64_t grain(const at::Tensor& t, int64_t items) {
  return std::max<int64_t>(1, kGrainBytes * items / std::max<int64_t>(1, t.numel() * t.element_size()));
}

template <typename T>
ChannelView<T> view(const at::Tensor& x) {
  const int64_t pixels = x.size(2) * x.size(3);
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  return x.is_contiguous() ? ChannelView<T>{data, x.size(0), pixels, x.size(1) * pixels, pixels, 1}
                           : ChannelView<T>{data, x.size(0), pixels, x.size(1) * pixels, 1, x.size(1)};
}

// where(live, weight, 0): the weight itself if its dead kernels hold zeros already.
at::Tensor masked_weight(const at::Tensor& weight, const MaskTable& mask, at::MemoryFormat format) {
  const at::Tensor full = weight.contiguous(format);
  const int64_t taps = full.size(2) * full.size(3);
  return with_element(full.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = full.size(0);
    std::atomic<bool> clean{true};
    at::parallel_for(0, rows, grain(full, rows), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; clean && k < end; ++k)
        if (!dead_weights_are_zero(const_elements<T>(full), layout_of(full), taps, mask, k, k + 1)) clean = false;
    });
    if (clean) return full;
    const at::Tensor masked = empty_cached(full.sizes(), full.options(), format);
    at::parallel_for(0, rows, grain(full, rows), [&](int64_t begin, int64_t end) {
      mask_weight(const_elements<T>(full), elements<T>(masked), layout_of(full), full.size(1), taps, &mask, nullptr,
                  begin, end);
    });
    return masked;
  });
}

// where(live filter, bias, 0)
at::Tensor masked_bias(const at::Tensor& bias, const MaskTable& mask) {
  const at::Tensor masked = bias.clone();
  with_element(bias.scalar_type(), [&](auto zero) {
    for (int64_t k = 0; k < bias.numel(); ++k)
      if (mask.out_slot()[k] == kDead) elements<decltype(zero)>(masked)[k] = zero;
  });
  return masked;
}

// Channels of the operand or of the result, and which of them are live.
struct ChannelSlots {
  const int32_t* slot;
  int64_t channels;
};

ChannelSlots filters(const MaskTable& mask) { return {mask.out_slot(), mask[kFilters]}; }
ChannelSlots channels(const MaskTable& mask) { return {mask.in_slot(), mask[kChannels]}; }

// A channel of the result, and what it has to be if nothing leaked.
struct Sentinel {
  Property property;
  int64_t channel;
};

std::vector<Sentinel> find_sentinels(const ChannelSlots& result, const ChannelSlots& operand, int64_t groups) {
  std::vector<Sentinel> sentinels;
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* first = result.slot + g * result.channels / groups;
    const int32_t* last = first + result.channels / groups;
    const int32_t* other = operand.slot + g * operand.channels / groups;
    const int32_t* zero = std::find(first, last, kDead);
    const int32_t* live = std::find_if(first, last, [](int32_t slot) { return slot != kDead; });
    const bool may_leak = std::any_of(other, other + operand.channels / groups, [](int32_t slot) { return slot < 0; });
    if (groups == 1 && zero != last)
      sentinels.push_back({Property::zero, zero - result.slot});
    else if (may_leak && live != last)
      sentinels.push_back({Property::finite, live - result.slot});
  }
  return sentinels;
}

// NHWC: all channels of a pixel share cache lines, so zeroing some of them is one pass over all of them.
template <typename T>
void zero_dead_pixels(const at::Tensor& x, const int32_t* slot) {
  std::vector<T> keep(x.size(1));
  for (int64_t c = 0; c < x.size(1); ++c) std::memset(&keep[c], slot[c] == kDead ? 0 : 0xff, sizeof(T));
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  at::parallel_for(0, pixels, grain(x, pixels), [&](int64_t begin, int64_t end) {
    keep_channels(elements<T>(x), x.size(1), keep.data(), begin, end);
  });
}

// The channels whose slot is kind become their bias, or exactly 0 without one.
void fill(const at::Tensor& x, const int32_t* slot, int32_t kind, const at::Tensor* bias) {
  with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, x.size(1), grain(x, x.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        if (slot[c] == kind) fill_channel(view<T>(x), c, bias ? const_elements<T>(*bias)[c] : zero);
    });
  });
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// Cache lines under one channel.
int64_t lines_of_a_channel(const at::Tensor& x) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), bytes = x.element_size();
  return x.is_contiguous() ? pixels * bytes / kLine : pixels * std::min(kLine, x.size(1) * bytes) / kLine;
}

bool all_finite(const at::Tensor& x) {
  const int64_t images = x.size(0), floats = x.numel() / std::max<int64_t>(1, images);
  return with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ChannelView<const T> whole{const_elements<T>(x), images, floats, floats, 0, 1};
    std::atomic<bool> finite{true};
    at::parallel_for(0, images, grain(x, images), [&](int64_t begin, int64_t end) {
      if (!channel_is(Property::finite, whole, 0, begin, end)) finite = false;
    });
    return finite.load();
  });
}

bool sentinels_hold(const at::Tensor& x, const ChannelSlots& result, const ChannelSlots& operand, int64_t groups) {
  const auto sentinels = find_sentinels(result, operand, groups);
  const int64_t images = x.size(0), checks = static_cast<int64_t>(sentinels.size()) * images;
  return with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::atomic<bool> hold{true};
    at::parallel_for(0, checks, grain(x, images * x.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; hold && i < end; ++i) {
        const Sentinel& s = sentinels[i / images];
        if (!channel_is(s.property, view<const T>(x), s.channel, i % images, i % images + 1)) hold = false;
      }
    });
    return hold.load();
  });
}

// After a full-width convolution whose dead weights are zeros: did every dead channel of the operand stay without
// effect, and are the dead channels of the result exactly 0? Zero weights make it so unless the operand holds a NaN or
// an infinity. That would show in every channel of the result, so one sentinel channel a group answers: a dead one must
// be 0, or else any one finite. An image's few channels are read whole instead, where that is less.
bool nothing_leaked(const at::Tensor& operand, const at::Tensor& result, const ChannelSlots& operand_side,
                    const ChannelSlots& result_side, int64_t groups) {
  const bool small = operand.numel() * operand.element_size() / kLine < lines_of_a_channel(result);
  return (small && all_finite(operand)) || sentinels_hold(result, result_side, operand_side, groups);
}

// In place: zeros in the dead channels.
void zero_dead_channels_(const at::Tensor& x, const int32_t* slot) {
  if (x.is_contiguous()) return fill(x, slot, kDead, nullptr);
  with_element(x.scalar_type(), [&](auto zero) { zero_dead_pixels<decltype(zero)>(x, slot); });
}

// A copy with zeros in the channels of negative slot.
at::Tensor without_dead_channels(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor masked = x.clone();
  zero_dead_channels_(masked, slot);
  fill(masked, slot, kConstant, nullptr);
  return masked;
}

// NHWC reads every channel anyway, and torch's sum reads them fastest.
at::Tensor sums_of_all(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor sums = at::sum(x, {0, 2, 3});
  for (int64_t c = 0; slot && c < x.size(1); ++c)
    if (slot[c] == kDead)
      std::memset(static_cast<char*>(sums.mutable_data_ptr()) + c * x.element_size(), 0, x.element_size());
  return sums;
}

// [N, K, P, Q] -> [K], 0 where slot is kDead; null slot: all live.
at::Tensor sums_of_channels(const at::Tensor& x, const int32_t* slot) {
  const bool wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
  if (wide && !x.is_contiguous()) return sums_of_all(x, slot);
  const at::Tensor sums = at::empty({x.size(1)}, x.options());
  with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, x.size(1), std::max<int64_t>(16, grain(x, x.size(1))), [&](int64_t begin, int64_t end) {
      prunekernels::channel_sums(view<const T>(x), slot, elements<T>(sums), begin, end);
    });
  });
  return sums;
}

}  // namespace

at::Tensor dense_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias) {
  const MaskTable& mask = call.mask;
  const ConvParams& p = call.params;
  const at::MemoryFormat format = call.format;
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

at::Tensor dense_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const MaskTable& mask = call.mask;
  const ConvParams& p = call.params;
  const at::MemoryFormat format = call.format;
  const at::Tensor x = call.empty({s.N, s.C, s.H, s.W}, grad_out);  // sizes only
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

void mask_grad_weight(const char*, const at::Tensor& grad, const MaskTable* mask, const OptionalTensor& scale) {
  if (!mask && !scale) return;
  with_element(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, grad.size(0), grain(grad, grad.size(0)), [&](int64_t begin, int64_t end) {
      mask_weight(const_elements<T>(grad), elements<T>(grad), layout_of(grad), grad.size(1),
                  grad.size(2) * grad.size(3), mask, const_floats(scale), begin, end);
    });
  });
}

void write_constants(const ConvCall<MaskTable>& call, const at::Tensor& y, const OptionalTensor& bias) {
  if (call.mask[kConstants]) fill(y, call.mask.out_slot(), kConstant, bias ? &*bias : nullptr);
}

at::Tensor channel_sums(const char*, const at::Tensor& x, const MaskTable* mask) {
  return sums_of_channels(x.contiguous(x.suggest_memory_format()), mask ? mask->out_slot() : nullptr);
}

}  // namespace prunekernels
