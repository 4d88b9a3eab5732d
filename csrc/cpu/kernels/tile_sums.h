// How a dot product ends: each vector of partial sums becomes one number.
#pragma once

#include <type_traits>

#include "cpu/kernels/simd.h"

namespace prunekernels {

template <class S>
struct HorizontalSums {
  using Vector = typename S::Vector;
  static constexpr int L = S::kLanes;

  // out[i] += the sum of v[i]
  template <int kCount>
  PK_INLINE void add(const Vector* v, float* out, std::integral_constant<int, kCount>) {
    if constexpr (L == 16 && kCount > 4) {
      constexpr int kPart = kCount < 16 ? kCount : 16;
      Vector part[16];
      PK_UNROLL for (int i = 0; i < 16; ++i) part[i] = i < kPart ? v[i < kPart ? i : 0] : S::zero();
      const Vector sums = S::sums(part);
      if constexpr (kPart == 16) {
        S::store(out, S::fma(S::set(1), sums, S::load(out)));
        if constexpr (kCount > 16) add(v + 16, out + 16, std::integral_constant<int, kCount - 16>());
      } else {
        S::store_first(out, S::fma(S::set(1), sums, S::load_first(out, kPart)), kPart);
      }
    } else {
      PK_UNROLL for (int i = 0; i < kCount; ++i) out[i] += S::sum(v[i]);
    }
  }
};

}  // namespace prunekernels
