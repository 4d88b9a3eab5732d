// Which algorithm serves a layer when nothing was measured: a cost model of two numbers.
//   dense    where-mask the weights, run the vendor's convolution at full width
//   compact  gather live channels -> vendor's convolution of the live sizes -> scatter, in batch chunks
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "core/mask_table.h"

namespace prunekernels {

enum class Direction { forward, grad_input, grad_weight };

// Multiply-adds the vendor's convolution does while one element is copied between memory and cache.
constexpr double kMultiplyAddsPerElement = 24;
// Compaction has to promise this much before it is worth its overhead.
constexpr double kMargin = 0.95;

inline bool compact_pays(const ConvShape& s, const MaskTable& mask, Direction direction) {
  const double images_pixels = static_cast<double>(s.N) * s.P * s.Q * s.taps();
  const double dense = images_pixels * s.K * s.channels_per_group();
  const double live = images_pixels * mask.out_count() * mask[kInPerGroup];
  const bool all_out = mask.out_count() == s.K, all_in = mask.in_count() == s.C;
  const double out_elements = static_cast<double>(s.N) * s.P * s.Q, in_elements = static_cast<double>(s.N) * s.H * s.W;
  // A gather moves the live channels, a scatter writes the full width.
  double copied = 0;
  if (!all_out) copied += out_elements * (direction == Direction::forward ? s.K : mask.out_count());
  if (!all_in) copied += in_elements * (direction == Direction::grad_input ? s.C : mask.in_count());
  return live + copied * kMultiplyAddsPerElement < dense * kMargin;
}

}  // namespace prunekernels
