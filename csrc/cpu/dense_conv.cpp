#include "cpu/dense_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>

#include "cpu/kernels/channels.h"
#include "cpu/kernels/weights.h"
#include "cpu/tensor_access.h"

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

}  // namespace

at::Tensor masked_weight(const at::Tensor& weight, const MaskTable& mask, at::MemoryFormat format) {
  const at::Tensor full = weight.contiguous(format);
  const int64_t taps = full.size(2) * full.size(3);
  return with_element(full.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = full.size(0);
    std::atomic<bool> clean{true};
    at::parallel_for(0, rows, grain(full, rows), [&](int64_t begin, int64_t end) {
      if (!dead_weights_are_zero(const_elements<T>(full), layout_of(full), taps, mask, begin, end)) clean = false;
    });
    if (clean) return full;
    const at::Tensor masked = at::empty_like(full);
    at::parallel_for(0, rows, grain(full, rows), [&](int64_t begin, int64_t end) {
      mask_weight(const_elements<T>(full), elements<T>(masked), layout_of(full), full.size(1), taps, &mask, nullptr,
                  begin, end);
    });
    return masked;
  });
}

at::Tensor masked_bias(const at::Tensor& bias, const MaskTable& mask) {
  const at::Tensor masked = bias.clone();
  with_element(bias.scalar_type(), [&](auto zero) {
    for (int64_t k = 0; k < bias.numel(); ++k)
      if (mask.out_slot()[k] == kDead) elements<decltype(zero)>(masked)[k] = zero;
  });
  return masked;
}

void mask_grad_weight_(const at::Tensor& grad, const MaskTable* mask, const float* scale) {
  if (!mask && !scale) return;
  with_element(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, grad.size(0), grain(grad, grad.size(0)), [&](int64_t begin, int64_t end) {
      mask_weight(const_elements<T>(grad), elements<T>(grad), layout_of(grad), grad.size(1),
                  grad.size(2) * grad.size(3), mask, scale, begin, end);
    });
  });
}

namespace {

bool channel_is(Property property, const at::Tensor& x, int64_t c) {
  return with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::atomic<bool> holds{true};
    at::parallel_for(0, x.size(0), grain(x, x.size(0)), [&](int64_t begin, int64_t end) {
      if (!prunekernels::channel_is(property, view<const T>(x), c, begin, end)) holds = false;
    });
    return holds.load();
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

}  // namespace

bool witnesses_hold(const at::Tensor& result, const int32_t* slot, int64_t groups) {
  const int64_t per_group = result.size(1) / groups;
  for (int64_t first = 0; first < result.size(1); first += per_group) {
    const int32_t* dead = std::find(slot + first, slot + first + per_group, kDead);
    const bool found = dead != slot + first + per_group;
    if (!channel_is(found ? Property::zero : Property::finite, result, found ? dead - slot : first)) return false;
  }
  return true;
}

at::Tensor without_dead_channels(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor masked = x.clone();
  zero_dead_channels_(masked, slot);
  fill(masked, slot, kConstant, nullptr);
  return masked;
}

void zero_dead_channels_(const at::Tensor& x, const int32_t* slot) { fill(x, slot, kDead, nullptr); }

void write_constant_channels_(const at::Tensor& x, const int32_t* slot, const at::Tensor* bias) {
  fill(x, slot, kConstant, bias);
}

at::Tensor channel_sums(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor sums = at::empty({x.size(1)}, x.options());
  with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, x.size(1), std::max<int64_t>(16, grain(x, x.size(1))), [&](int64_t begin, int64_t end) {
      prunekernels::channel_sums(view<const T>(x), slot, elements<T>(sums), begin, end);
    });
  });
  return sums;
}

}  // namespace prunekernels
