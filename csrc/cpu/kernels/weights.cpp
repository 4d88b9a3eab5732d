#include "cpu/kernels/weights.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "core/scalar_types.h"

namespace prunekernels {
namespace {

template <typename T>
T scaled(T value, const float* scale, int64_t filter) {
  if (!scale) return value;
  using A = typename Arithmetic<T>::type;
  const float s = scale[filter];
  return s == 0 ? T{} : Arithmetic<T>::narrow(static_cast<A>(value) * static_cast<A>(s));
}

// One kernel: taps elements, zeros where from is null.
template <typename T>
void copy_taps(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t taps) {
  if (taps == 9 && from && from_stride == 1 && to_stride == 1) {  // the usual 3x3, unrolled
    for (int64_t t = 0; t < 9; ++t) to[t] = from[t];
    return;
  }
  for (int64_t t = 0; t < taps; ++t) to[t * to_stride] = from ? from[t * from_stride] : T{};
}

// The dead channels of one filter after another.
class DeadChannels {
 public:
  explicit DeadChannels(const MaskTable& mask)
      : mask_(mask),
        channels_(mask.channels_per_group()),
        filters_per_group_(mask[kFilters] / mask[kGroups]),
        shared_(mask[kPairsFull]) {}

  bool all(int64_t filter) const { return mask_.out_slot()[filter] < 0; }
  // Ascending; of a filter of which not all are. Where no single kernel is dead, one list serves a group.
  const std::vector<int32_t>& of(int64_t filter) {
    const int64_t listed = shared_ ? filter / filters_per_group_ : filter;
    if (listed != listed_) list(filter);
    listed_ = listed;
    return list_;
  }

 private:
  void list(int64_t filter) {  // 32 live channels cost one step
    list_.clear();
    for (int64_t first = 0; first < channels_; first += 32) {
      const uint32_t valid = channels_ - first < 32 ? (1u << (channels_ - first)) - 1 : ~0u;
      for (uint32_t dead = ~mask_.pairs(filter)[first >> 5] & valid; dead; dead &= dead - 1)
        list_.push_back(static_cast<int32_t>(first + __builtin_ctz(dead)));
    }
  }

  const MaskTable& mask_;
  const int64_t channels_, filters_per_group_;
  const bool shared_;
  int64_t listed_ = -1;
  std::vector<int32_t> list_;
};

// No early exit, so that loads overlap and the loop vectorises.
template <typename T>
bool all_zero(const T* run, int64_t count) {
  bool zero = true;
  for (int64_t i = 0; i < count; ++i) zero &= run[i] == 0;
  return zero;
}

template <typename T>
bool channels_are_zero(const T* row, const WeightLayout& layout, int64_t taps, const std::vector<int32_t>& channels) {
  bool zero = true;
  if (layout.tap == 1) {
    for (int64_t c : channels) zero &= all_zero(row + c * layout.channel, taps);
  } else {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c : channels) zero &= row[t * layout.tap + c * layout.channel] == 0;
  }
  return zero;
}

template <typename T>
void zero_channels(T* row, const WeightLayout& layout, int64_t taps, const std::vector<int32_t>& channels) {
  if (layout.tap == 1) {
    for (int64_t c : channels) std::fill_n(row + c * layout.channel, taps, T{});
  } else {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c : channels) row[t * layout.tap + c * layout.channel] = T{};
  }
}

}  // namespace

template <typename T>
void pack_weight(const T* full, T* compact, const WeightMove& move, int64_t begin, int64_t end) {
  const MaskTable& mask = move.mask;
  const int64_t out_per_group = mask[kOutPerGroup], in_per_group = mask[kInPerGroup], Cg = mask.channels_per_group();
  const bool by_vector = move.columns && move.full.channel == 1 && move.compact.channel == 1;
  const PixelCopy copy = by_vector ? pick_gather_pixels(sizeof(T), *move.columns) : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = mask.out_index()[i];
    const int32_t* columns = mask.in_index() + i / out_per_group * in_per_group;
    T* to = compact + i * move.compact.row;
    if (k < 0) {
      std::fill(to, to + in_per_group * move.taps, T{});
      continue;
    }
    const T* row = full + k * move.full.row;
    if (copy) {
      copy(reinterpret_cast<const char*>(row), reinterpret_cast<char*>(to), 0, move.taps, *move.columns);
      continue;
    }
    for (int64_t j = 0; j < in_per_group; ++j) {
      const int64_t c = columns[j] < 0 ? 0 : columns[j] % Cg;
      const bool live = columns[j] >= 0 && (mask[kPairsFull] || mask.pair(k, c));
      copy_taps(live ? row + c * move.full.channel : nullptr, move.full.tap, to + j * move.compact.channel,
                move.compact.tap, move.taps);
    }
  }
}

template <typename T>
void unpack_grad_weight(const T* compact, T* full, const WeightMove& move, const float* scale, int64_t begin,
                        int64_t end) {
  const MaskTable& mask = move.mask;
  const int64_t Cg = mask.channels_per_group(), Kg = mask[kFilters] / mask[kGroups], in_per_group = mask[kInPerGroup];
  const bool by_vector = move.columns && move.full.channel == 1 && move.compact.channel == 1;
  const PixelCopy copy = by_vector ? pick_scatter_pixels(sizeof(T), *move.columns) : nullptr;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t i = mask.out_slot()[k];
    T* to = full + k * move.full.row;
    if (i < 0) {
      std::fill(to, to + Cg * move.taps, T{});
      continue;
    }
    const T* row = compact + i * move.compact.row;
    if (copy) {
      copy(reinterpret_cast<const char*>(row), reinterpret_cast<char*>(to), 0, move.taps, *move.columns);
    } else {
      const int32_t* slots = mask.in_slot() + k / Kg * Cg;
      for (int64_t c = 0; c < Cg; ++c) {
        const bool live = slots[c] >= 0 && (mask[kPairsFull] || mask.pair(k, c));
        copy_taps(live ? row + slots[c] % in_per_group * move.compact.channel : nullptr, move.compact.tap,
                  to + c * move.full.channel, move.full.tap, move.taps);
      }
    }
    if (scale)  // the row is in cache still
      for (int64_t e = 0; e < Cg * move.taps; ++e) to[e] = scaled(to[e], scale, k);
  }
}

template <typename T>
void mask_weight(const T* from, T* to, const WeightLayout& layout, int64_t channels, int64_t taps,
                 const MaskTable* mask, const float* scale, int64_t begin, int64_t end) {
  std::optional<DeadChannels> dead;
  if (mask) dead.emplace(*mask);
  for (int64_t k = begin; k < end; ++k) {
    T* row = to + k * layout.row;
    if (dead && dead->all(k)) {
      std::fill(row, row + channels * taps, T{});
      continue;
    }
    if (to != from) std::copy(from + k * layout.row, from + (k + 1) * layout.row, row);
    if (dead) zero_channels(row, layout, taps, dead->of(k));
    if (scale)
      for (int64_t e = 0; e < channels * taps; ++e) row[e] = scaled(row[e], scale, k);
  }
}

template <typename T>
bool dead_weights_are_zero(const T* full, const WeightLayout& layout, int64_t taps, const MaskTable& mask,
                           int64_t begin, int64_t end) {
  const int64_t channels = mask.channels_per_group();
  DeadChannels dead(mask);
  for (int64_t k = begin; k < end; ++k) {
    const T* row = full + k * layout.row;
    if (!(dead.all(k) ? all_zero(row, channels * taps) : channels_are_zero(row, layout, taps, dead.of(k))))
      return false;
  }
  return true;
}

#define PK_INSTANTIATE(T)                                                                                        \
  template void pack_weight(const T*, T*, const WeightMove&, int64_t, int64_t);                                  \
  template void unpack_grad_weight(const T*, T*, const WeightMove&, const float*, int64_t, int64_t);             \
  template void mask_weight(const T*, T*, const WeightLayout&, int64_t, int64_t, const MaskTable*, const float*, \
                            int64_t, int64_t);                                                                   \
  template bool dead_weights_are_zero(const T*, const WeightLayout&, int64_t, const MaskTable&, int64_t, int64_t);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
