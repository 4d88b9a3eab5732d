#include "cpu/dense_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "core/conv_axes.h"
#include "core/cover.h"
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

int64_t bytes(const at::Tensor& t) { return t.numel() * t.element_size(); }

bool dead_are_zero(const at::Tensor& weight, const MaskTable& mask) {
  const int64_t rows = weight.size(0), taps = weight.size(2) * weight.size(3);
  return with_element(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::atomic<bool> clean{true};
    at::parallel_for(0, rows, grain(weight, rows), [&](int64_t begin, int64_t end) {
      if (!dead_weights_are_zero(const_elements<T>(weight), layout_of(weight), taps, mask, begin, end)) clean = false;
    });
    return clean.load();
  });
}

// to = where(live, weight, 0), rows times scale; in place if to is weight.
void write_masked(const at::Tensor& weight, const at::Tensor& to, const MaskTable* mask, const float* scale) {
  with_element(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, weight.size(0), grain(weight, weight.size(0)), [&](int64_t begin, int64_t end) {
      mask_weight(const_elements<T>(weight), elements<T>(to), layout_of(weight), weight.size(1),
                  weight.size(2) * weight.size(3), mask, scale, begin, end);
    });
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

// The operand or the result of a convolution.
struct Side {
  const int32_t* slot;  // [channels]
  int64_t channels;

  int64_t count(bool (*is)(int32_t slot)) const { return std::count_if(slot, slot + channels, is); }
};

bool is_dead(int32_t slot) { return slot == kDead; }
bool is_skipped(int32_t slot) { return slot < 0; }  // dead or constant

Side filters(const MaskTable& mask) { return {mask.out_slot(), mask[kFilters]}; }
Side channels(const MaskTable& mask) { return {mask.in_slot(), mask[kChannels]}; }

// One direction at full width: result = run(operand, weight).
struct Pass {
  const ConvCall<MaskTable>& call;
  Side operand, result;
  Axis (*axis)(const ConvShape& shape, int axis);  // of that direction
  c10::function_ref<at::Tensor(const at::Tensor& operand, const at::Tensor& weight)> run;

  int64_t result_bytes() const {
    const ConvShape& s = call.shape;
    return s.N * result.channels * (axis == forward_axis ? s.out_pixels() : s.in_pixels()) * elementSize(call.dtype);
  }
};

// Of the result: what its channels have to be if nothing leaked.
std::vector<Sentinel> find_sentinels(const Side& result, const Side& operand, int64_t groups) {
  std::vector<Sentinel> sentinels;
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* first = result.slot + g * result.channels / groups;
    const int32_t* last = first + result.channels / groups;
    const int32_t* other = operand.slot + g * operand.channels / groups;
    const int32_t* zero = std::find(first, last, kDead);
    if (zero != last)
      sentinels.push_back({Property::zero, zero - result.slot});
    else if (std::any_of(other, other + operand.channels / groups, is_skipped))
      sentinels.push_back({Property::finite, first - result.slot});
  }
  return sentinels;
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

// to = from with zeros in the channels whose slot `goes`; in place if to is from.
void zero_channels(const at::Tensor& from, const at::Tensor& to, const Side& side, bool (*goes)(int32_t slot)) {
  std::vector<int32_t> gone;
  for (int32_t c = 0; c < side.channels; ++c)
    if (goes(side.slot[c])) gone.push_back(c);
  with_element(from.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* source = from.is_same(to) ? nullptr : const_elements<T>(from);
    const ChannelView<T> x = view<T>(to);
    const int64_t rows = x.pixel == 1 ? x.batches : x.batches * x.pixels;  // of all channels, side by side
    at::parallel_for(0, rows, grain(to, rows), [&](int64_t begin, int64_t end) {
      copy_without(source, x, gone.data(), static_cast<int64_t>(gone.size()), begin, end);
    });
  });
}

// In place: zeros in the dead channels.
void zero_dead_channels_(const at::Tensor& x, const Side& side) { zero_channels(x, x, side, is_dead); }

// A copy with zeros in the channels that no live kernel reads.
at::Tensor without_skipped_channels(const at::Tensor& x, const Side& side, at::MemoryFormat format) {
  const at::Tensor copy = empty_cached(x.sizes(), x.options(), format);
  zero_channels(x, copy, side, is_skipped);
  return copy;
}

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kApart = 6;  // how many neighbouring lines are read in the time of one far from others

bool all_finite(const at::Tensor& x) {
  const int64_t images = x.size(0), floats = x.numel() / std::max<int64_t>(1, images);
  return with_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ChannelView<const T> whole{const_elements<T>(x), images, floats, floats, 0, 1};
    std::atomic<bool> finite{true};
    at::parallel_for(0, images, grain(x, images), [&](int64_t begin, int64_t end) {
      if (!channel_is(Property::finite, whole, 0, {nullptr, 0}, begin, end)) finite = false;
    });
    return finite.load();
  });
}

// covering_pixels; nothing where each pixel is read by one result alone.
std::optional<std::vector<int32_t>> covering(const Pass& pass) {
  const ConvShape& s = pass.call.shape;
  if (s.taps() == 1 && s.in_pixels() == s.out_pixels()) return std::nullopt;
  return covering_pixels(pass.axis(s, 0), pass.axis(s, 1));
}

// After a full-width convolution whose dead weights are zeros: did every dead channel of the operand stay without
// effect, and are the dead channels of the result exactly 0? Zero weights make it so unless the operand holds a NaN or
// an infinity. That would show in every channel of the result, wherever the window has it, so one sentinel channel a
// group answers at as many pixels as it takes to have been through all of the operand: a dead channel must be 0 there,
// or else any one finite. An image's few channels are read whole instead, where that is less.
bool nothing_leaked(const Pass& pass, const at::Tensor& operand, const at::Tensor& result) {
  const std::vector<Sentinel> sentinels = find_sentinels(pass.result, pass.operand, pass.call.params.groups);
  const auto chosen = covering(pass);
  const PixelList pixels =
      chosen ? PixelList{chosen->data(), static_cast<int64_t>(chosen->size())} : PixelList{nullptr, 0};
  const int64_t images = result.size(0), count = static_cast<int64_t>(sentinels.size());
  const int64_t pixel_bytes = result.is_contiguous()
                                  ? count * result.element_size()
                                  : std::min(count * kLine, pass.result.channels * result.element_size());
  const int64_t image_bytes = pixel_bytes * (chosen ? pixels.count : result.size(2) * result.size(3));
  const int64_t apart = result.is_contiguous() ? 1 : kApart;
  if (bytes(operand) < apart * images * image_bytes && all_finite(operand)) return true;
  return with_element(result.scalar_type(), [&](auto zero) {
    const auto x = view<const decltype(zero)>(result);
    std::atomic<bool> hold{true};
    at::parallel_for(0, images, kGrainBytes / (image_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      if (!sentinels_hold(sentinels.data(), count, x, pixels, begin, end)) hold = false;
    });
    return hold.load();
  });
}

// Whether a copy of the operand is cheaper than one of the weight, zeros in the result included. Bytes moved: a copy
// reads, fetches what it overwrites, and writes.
bool operand_is_cheaper(const Pass& pass, const at::Tensor& operand, const at::Tensor& weight) {
  const int64_t result = pass.result_bytes(), dead = pass.result.count(is_dead);
  int64_t cost = pass.operand.count(is_skipped) ? 3 * bytes(operand) + result / operand.size(0) : 0;
  if (dead) cost += pass.call.channels_last() ? 2 * result : 2 * result * dead / pass.result.channels;
  const bool serves_both = pass.call.weight.masked_copy != nullptr;  // the weight's, both passes
  return cost * (serves_both ? 2 : 1) < 3 * bytes(weight);
}

// Dead channels masked rather than weights: zeros in the operand, and afterwards in the result. A dead weight of a live
// filter then meets zeros only, which a NaN or an infinity among these weights would still turn into NaN, in the first
// image as in all others: if that is finite, so they are. Nothing where it is not.
std::optional<at::Tensor> with_masked_operand(const Pass& pass, const at::Tensor& operand, const at::Tensor& weight) {
  const bool copies = pass.operand.count(is_skipped) > 0;
  const at::Tensor result =
      pass.run(copies ? without_skipped_channels(operand, pass.operand, pass.call.format) : operand, weight);
  zero_dead_channels_(result, pass.result);
  if (copies && !all_finite(result.narrow(0, 0, 1))) return std::nullopt;
  return result;
}

at::Tensor with_masked_weight(const Pass& pass, const at::Tensor& operand, const at::Tensor& weight) {
  const at::Tensor result = pass.run(operand, weight);
  if (pass.call.operand_is_finite || nothing_leaked(pass, operand, result)) return result;
  const at::Tensor again = pass.run(without_skipped_channels(operand, pass.operand, pass.call.format), weight);
  zero_dead_channels_(again, pass.result);
  return again;
}

at::Tensor run_masked(const Pass& pass, const at::Tensor& operand, const at::Tensor& weight) {
  const MaskTable& mask = pass.call.mask;
  const WeightFacts& facts = pass.call.weight;
  const at::Tensor full = weight.contiguous(pass.call.format);
  at::Tensor masked = full;
  bool is_own = facts.is_own || !full.is_same(weight);
  if (!facts.dead_are_zero && !dead_are_zero(full, mask)) {
    if (mask[kPairsFull] && operand_is_cheaper(pass, operand, full))
      if (const auto result = with_masked_operand(pass, operand, full)) return *result;
    if (!is_own) masked = empty_cached(full.sizes(), full.options(), pass.call.format);
    write_masked(full, masked, &mask, nullptr);
    is_own = true;
  }
  if (facts.masked_copy && is_own) *facts.masked_copy = masked;
  return with_masked_weight(pass, operand, masked);
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
  const bool masks = !call.mask.nothing_dead();
  const OptionalTensor b = bias && masks ? OptionalTensor(masked_bias(*bias, call.mask)) : bias;
  const auto run = [&](const at::Tensor& operand, const at::Tensor& w) {
    if (vendor::is_product(call.shape, call.dtype, x.device())) return vendor::product(operand, w, b, call.format);
    return vendor::conv(operand, w, b, call.params, call.params.groups).contiguous(call.format);
  };
  if (!masks) return run(x, weight.contiguous(call.format));
  return run_masked({call, channels(call.mask), filters(call.mask), forward_axis, run}, x, weight);
}

at::Tensor dense_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const auto run = [&](const at::Tensor& operand, const at::Tensor& w) {
    if (vendor::is_product(s, call.dtype, operand.device())) return vendor::product_grad_input(operand, w, call.format);
    const at::Tensor x = vendor::sizes_only({s.N, s.C, s.H, s.W}, operand.options(), call.format);
    return vendor::grad_input(operand, x, w, call.params, call.params.groups).contiguous(call.format);
  };
  if (call.mask.nothing_dead()) return run(grad_out, weight.contiguous(call.format));
  return run_masked({call, filters(call.mask), channels(call.mask), grad_input_axis, run}, grad_out, weight);
}

bool shows_finite(const at::Tensor& grad_weight, const ConvShape& s) {
  constexpr int64_t kLineFloats = kLine / sizeof(float);
  const int64_t lines = s.channels_per_group() == 1 ? s.K * s.taps() / kLineFloats : s.K * s.taps();
  const int64_t lines_a_pixel = std::min(s.G, (s.C + kLineFloats - 1) / kLineFloats);
  if (lines > s.N * s.in_pixels() / s.taps() * lines_a_pixel) return false;
  return with_element(grad_weight.scalar_type(), [&](auto zero) {
    const auto kernels = view<const decltype(zero)>(grad_weight);
    return channel_is(Property::finite, kernels, 0, {nullptr, 0}, 0, kernels.batches);
  });
}

void mask_grad_weight(const char*, const at::Tensor& grad, const MaskTable* mask, const OptionalTensor& scale) {
  if (mask || scale) write_masked(grad, grad, mask, const_floats(scale));
}

// NHWC: one pass over all channels, as above.
void write_constants(const ConvCall<MaskTable>& call, const at::Tensor& y, const OptionalTensor& bias) {
  const int32_t* slot = call.mask.out_slot();
  if (!call.mask[kConstants]) return;
  if (y.is_contiguous()) return fill(y, slot, kConstant, bias ? &*bias : nullptr);
  with_element(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> keep(y.size(1)), values(y.size(1), zero);
    for (int64_t k = 0; k < y.size(1); ++k) {
      std::memset(&keep[k], slot[k] == kConstant ? 0 : 0xff, sizeof(T));
      if (bias && slot[k] == kConstant) values[k] = const_elements<T>(*bias)[k];
    }
    const int64_t pixels = y.size(0) * y.size(2) * y.size(3);
    at::parallel_for(0, pixels, grain(y, pixels), [&](int64_t begin, int64_t end) {
      set_channels(elements<T>(y), y.size(1), keep.data(), values.data(), begin, end);
    });
  });
}

at::Tensor channel_sums(const char*, const at::Tensor& x, const MaskTable* mask) {
  return sums_of_channels(x.contiguous(x.suggest_memory_format()), mask ? mask->out_slot() : nullptr);
}

}  // namespace prunekernels
