// Masks and scales one row of a weight's gradient in place and forms the sums that pruning criteria read; and norms of
// a row. Sums are formed in float (of doubles: in double), in an order that depends on the instruction set alone.
#pragma once

#include <cstdint>

#include "core/scalar_types.h"

namespace prunekernels {

// g = live && scale != 0 ? g * scale : 0; all sums are of this g as it is stored. Pointers may be null where noted.
template <typename T>
struct MaskGradRow {
  using Sum = typename Arithmetic<T>::type;
  T* grad;               // [elements]
  const T* weight;       // [elements]; for product_sum alone
  Sum* accumulated;      // [elements]; += g; or null
  const uint32_t* live;  // a bit per element; null: all live
  int64_t elements;
  Sum scale;         // 0: the row is dead
  Sum* abs_sum;      // sum of |g|; or null
  Sum* square_sum;   // sum of g^2; or null
  Sum* product_sum;  // sum of w g; or null
  bool add_to_sums;  // the sums are added to what is there; else they replace it
};

template <typename T>
struct NormRow {
  using Sum = typename Arithmetic<T>::type;
  const T* weight;       // [elements]
  const uint32_t* live;  // a bit per element; null: all live
  int64_t elements;
  Sum* abs_sum;     // sum of |w|
  Sum* square_sum;  // sum of w^2
};

struct MaskGradKernels {
  void (*mask_grad)(const MaskGradRow<float>& row);
  void (*norm)(const NormRow<float>& row);
};
const MaskGradKernels& mask_grad_kernels();  // the best the instruction set in force allows

// The same for any element type, by the scalar kernels.
template <typename T>
void mask_grad(const MaskGradRow<T>& row);
template <typename T>
void row_norm(const NormRow<T>& row);

// The norms of each kernel of a row: [channels]. The row is [channels, taps], or [taps, channels] if channels_last;
// pairs: a bit per channel, null: all live.
template <typename T>
void kernel_norms(const T* weight, const uint32_t* pairs, int64_t channels, int64_t taps, bool channels_last,
                  typename Arithmetic<T>::type* abs_sums, typename Arithmetic<T>::type* square_sums);

}  // namespace prunekernels
