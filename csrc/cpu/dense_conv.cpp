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
      for (int64_t k = begin; clean && k < end; ++k)
        if (!dead_weights_are_zero(const_elements<T>(full), layout_of(full), taps, mask, k, k + 1)) clean = false;
    });
    if (clean) return full;
    const at::Tensor masked = fresh(full.sizes(), full.options(), format);
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

struct Witness {
  Property property;
  int64_t channel;
};

std::vector<Witness> find_witnesses(const Side& result, const Side& operand, int64_t groups) {
  std::vector<Witness> witnesses;
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* first = result.slot + g * result.channels / groups;
    const int32_t* last = first + result.channels / groups;
    const int32_t* other = operand.slot + g * operand.channels / groups;
    const int32_t* zero = std::find(first, last, kDead);
    const int32_t* live = std::find_if(first, last, [](int32_t slot) { return slot != kDead; });
    const bool may_leak = std::any_of(other, other + operand.channels / groups, [](int32_t slot) { return slot < 0; });
    if (groups == 1 && zero != last)
      witnesses.push_back({Property::zero, zero - result.slot});
    else if (may_leak && live != last)
      witnesses.push_back({Property::finite, live - result.slot});
  }
  return witnesses;
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

bool witnesses_hold(const at::Tensor& x, const Side& result, const Side& operand, int64_t groups) {
  const auto witnesses = find_witnesses(result, operand, groups);
  const int64_t images = x.size(0), checks = static_cast<int64_t>(witnesses.size()) * images;
  return with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::atomic<bool> hold{true};
    at::parallel_for(0, checks, grain(x, images * x.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; hold && i < end; ++i) {
        const Witness& w = witnesses[i / images];
        if (!channel_is(w.property, view<const T>(x), w.channel, i % images, i % images + 1)) hold = false;
      }
    });
    return hold.load();
  });
}

}  // namespace

bool nothing_leaked(const at::Tensor& operand, const at::Tensor& result, const Side& operand_side,
                    const Side& result_side, int64_t groups) {
  const bool small = operand.numel() * operand.element_size() / kLine < lines_of_a_channel(result);
  return (small && all_finite(operand)) || witnesses_hold(result, result_side, operand_side, groups);
}

at::Tensor without_dead_channels(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor masked = x.clone();
  zero_dead_channels_(masked, slot);
  fill(masked, slot, kConstant, nullptr);
  return masked;
}

void zero_dead_channels_(const at::Tensor& x, const int32_t* slot) {
  if (x.is_contiguous()) return fill(x, slot, kDead, nullptr);
  with_element(x.scalar_type(), [&](auto zero) { zero_dead_pixels<decltype(zero)>(x, slot); });
}

void write_constant_channels_(const at::Tensor& x, const int32_t* slot, const at::Tensor* bias) {
  fill(x, slot, kConstant, bias);
}

namespace {

// NHWC reads every channel anyway, and torch's sum reads them fastest.
at::Tensor sums_of_all(const at::Tensor& x, const int32_t* slot) {
  const at::Tensor sums = at::sum(x, {0, 2, 3});
  for (int64_t c = 0; slot && c < x.size(1); ++c)
    if (slot[c] == kDead)
      std::memset(static_cast<char*>(sums.mutable_data_ptr()) + c * x.element_size(), 0, x.element_size());
  return sums;
}

}  // namespace

at::Tensor channel_sums(const at::Tensor& x, const int32_t* slot) {
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

}  // namespace prunekernels
