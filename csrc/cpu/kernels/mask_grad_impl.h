// The row passes of mask_grad.h for the vectors of masked_simd.h. Include inside a region that is compiled for one
// instruction set.
#pragma once

#include "cpu/kernels/mask_grad.h"
#include "cpu/kernels/masked_simd.h"

namespace prunekernels {

// Zeros the dead elements of a row and touches no others.
template <typename V>
void zero_dead(typename V::Element* row, const uint32_t* live, int64_t elements) {
  using T = typename V::Element;
  for (int64_t first = 0; first < elements; first += 32) {
    const int64_t count = elements - first < 32 ? elements - first : 32;
    const uint32_t word = live[first >> 5], all = count == 32 ? ~0u : (1u << count) - 1;
    if (word == all) continue;
    for (int64_t i = 0; i < count; ++i) row[first + i] = word >> i & 1 ? row[first + i] : T{};
  }
}

template <typename V>
struct MaskGradVector {
  using T = typename V::Element;
  using Vector = typename V::Vector;
  using Wide = typename V::Wide;

  const MaskGradRow<T> row;  // a copy: stores cannot alias it
  const Vector scale;
  const bool scales, sums;
  Vector abs_sum, square_sum, product_sum;

  __attribute__((always_inline)) explicit MaskGradVector(const MaskGradRow<T>& row)
      : row(row),
        scale(V::set(row.scale)),
        scales(row.scale != 1),
        sums(row.abs_sum || row.square_sum || row.product_sum),
        abs_sum(V::set(0)),
        square_sum(V::set(0)),
        product_sum(V::set(0)) {}

  __attribute__((always_inline)) void whole(int64_t i) { pass(i); }
  __attribute__((always_inline)) void some(int64_t i, typename V::Mask live) { last(i, live); }
  __attribute__((always_inline)) void last(int64_t i, typename V::Mask live) {
    if (V::any(live)) pass(i, live);
  }

  template <typename... Live>
  __attribute__((always_inline)) void pass(int64_t i, Live... live) {
    Vector g = V::load(row.grad + i, live...);
    if (scales) {
      g = V::mul(g, scale);
      V::store(row.grad + i, g, live...);
    }
    if (sums) {
      abs_sum = Wide::add(abs_sum, V::abs(g));
      square_sum = Wide::fma(g, g, square_sum);
      if (row.weight) product_sum = Wide::fma(V::load(row.weight + i, live...), g, product_sum);
    }
    if (row.accumulated)
      Wide::store(row.accumulated + i, Wide::add(Wide::load(row.accumulated + i, live...), g), live...);
  }
};

template <typename Sum>
PK_INLINE void put_sum(Sum* sums, Sum value, bool add) {
  if (sums) *sums = add ? *sums + value : value;
}

template <typename V>
void mask_grad_row(const MaskGradRow<typename V::Element>& row) {
  using T = typename V::Element;
  using Sum = typename MaskGradRow<T>::Sum;
  MaskGradVector<V> pass(row);
  if (row.scale == 0) {
    for (int64_t i = 0; i < row.elements; ++i) row.grad[i] = T{};
  } else {
    if (row.live) zero_dead<V>(row.grad, row.live, row.elements);
    if (pass.scales || pass.sums || row.accumulated) each_vector<V>(row.live, row.elements, pass);
  }
  put_sum(row.abs_sum, static_cast<Sum>(V::sum(pass.abs_sum)), row.add_to_sums);
  put_sum(row.square_sum, static_cast<Sum>(V::sum(pass.square_sum)), row.add_to_sums);
  put_sum(row.product_sum, static_cast<Sum>(V::sum(pass.product_sum)), row.add_to_sums);
}

template <typename V>
struct NormVector {
  using T = typename V::Element;
  using Vector = typename V::Vector;
  using Wide = typename V::Wide;

  const T* const weight;
  Vector abs_sum, square_sum;

  __attribute__((always_inline)) explicit NormVector(const T* weight)
      : weight(weight), abs_sum(V::set(0)), square_sum(V::set(0)) {}

  __attribute__((always_inline)) void whole(int64_t i) { pass(V::load(weight + i)); }
  __attribute__((always_inline)) void some(int64_t i, typename V::Mask live) { pass(V::load(weight + i, live)); }
  __attribute__((always_inline)) void last(int64_t i, typename V::Mask live) { pass(V::load(weight + i, live)); }
  __attribute__((always_inline)) void pass(Vector w) {
    abs_sum = Wide::add(abs_sum, V::abs(w));
    square_sum = Wide::fma(w, w, square_sum);
  }
};

template <typename V>
void norm_row(const NormRow<typename V::Element>& row) {
  NormVector<V> pass(row.weight);
  each_vector<V>(row.live, row.elements, pass);
  *row.abs_sum = V::sum(pass.abs_sum);
  *row.square_sum = V::sum(pass.square_sum);
}

template <typename V>
MaskGradKernels mask_grad_kernels_of() {
  return {mask_grad_row<V>, norm_row<V>};
}

}  // namespace prunekernels
