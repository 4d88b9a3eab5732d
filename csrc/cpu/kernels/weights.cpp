#include "cpu/kernels/weights.h"

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

// Visits (channel, tap) in the order in which the layout is contiguous.
template <typename Visit>
void each_weight(int64_t channels, int64_t taps, bool channels_last, Visit visit) {
  if (channels_last) {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) visit(c, t);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) visit(c, t);
  }
}

}  // namespace

template <typename T>
void pack_weight(const T* full, const WeightLayout& full_layout, T* compact, const WeightLayout& compact_layout,
                 int64_t taps, const MaskTable& mask, int64_t begin, int64_t end) {
  const int64_t out_per_group = mask[kOutPerGroup], in_per_group = mask[kInPerGroup], Cg = mask.channels_per_group();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = mask.out_index()[i];
    const int32_t* columns = mask.in_index() + i / out_per_group * in_per_group;
    T* to = compact + i * compact_layout.row;
    for (int64_t j = 0; j < in_per_group; ++j) {
      const int64_t c = columns[j] < 0 ? 0 : columns[j] % Cg;
      const bool live = k >= 0 && columns[j] >= 0 && (mask[kPairsFull] || mask.pair(k, c));
      const T* from = full + (live ? k : 0) * full_layout.row + c * full_layout.channel;
      for (int64_t t = 0; t < taps; ++t)
        to[j * compact_layout.channel + t * compact_layout.tap] = live ? from[t * full_layout.tap] : T{};
    }
  }
}

template <typename T>
void unpack_grad_weight(const T* compact, const WeightLayout& compact_layout, T* full, const WeightLayout& full_layout,
                        int64_t taps, const MaskTable& mask, const float* scale, int64_t begin, int64_t end) {
  const int64_t Cg = mask.channels_per_group(), Kg = mask[kFilters] / mask[kGroups], in_per_group = mask[kInPerGroup];
  for (int64_t k = begin; k < end; ++k) {
    const int64_t i = mask.out_slot()[k], first_channel = k / Kg * Cg;
    T* to = full + k * full_layout.row;
    each_weight(Cg, taps, full_layout.channel == 1, [&](int64_t c, int64_t t) {
      const int64_t j = mask.in_slot()[first_channel + c];
      const bool live = i >= 0 && j >= 0 && mask.pair(k, c);
      to[c * full_layout.channel + t * full_layout.tap] =
          live ? scaled(compact[i * compact_layout.row + j % in_per_group * compact_layout.channel +
                                t * compact_layout.tap],
                        scale, k)
               : T{};
    });
  }
}

template <typename T>
void mask_weight(const T* from, T* to, const WeightLayout& layout, int64_t channels, int64_t taps,
                 const MaskTable* mask, const float* scale, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k)
    each_weight(channels, taps, layout.channel == 1, [&](int64_t c, int64_t t) {
      const int64_t at = k * layout.row + c * layout.channel + t * layout.tap;
      to[at] = !mask || mask->pair(k, c) ? scaled(from[at], scale, k) : T{};
    });
}

template <typename T>
bool dead_weights_are_zero(const T* full, const WeightLayout& layout, int64_t taps, const MaskTable& mask) {
  const int64_t Cg = mask.channels_per_group();
  for (int64_t k = 0; k < mask[kFilters]; ++k)
    for (int64_t c = 0; c < Cg; ++c) {
      if (mask.pair(k, c)) continue;
      for (int64_t t = 0; t < taps; ++t)
        if (full[k * layout.row + c * layout.channel + t * layout.tap] != 0) return false;
    }
  return true;
}

#define PK_INSTANTIATE(T)                                                                                             \
  template void pack_weight(const T*, const WeightLayout&, T*, const WeightLayout&, int64_t, const MaskTable&,        \
                            int64_t, int64_t);                                                                        \
  template void unpack_grad_weight(const T*, const WeightLayout&, T*, const WeightLayout&, int64_t, const MaskTable&, \
                                   const float*, int64_t, int64_t);                                                   \
  template void mask_weight(const T*, T*, const WeightLayout&, int64_t, int64_t, const MaskTable*, const float*,      \
                            int64_t, int64_t);                                                                        \
  template bool dead_weights_are_zero(const T*, const WeightLayout&, int64_t, const MaskTable&);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
