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

// The vendor's kernels compute whole vectors of channels: 51 live ones cost as much as 64, 8 nearly as much as 16.
// Image inputs have kernels of their own.
inline int64_t whole_vectors(int64_t channels) { return channels < 8 ? channels : (channels + 15) / 16 * 16; }

inline bool compact_pays(const ConvShape& s, const MaskTable& mask, Direction direction) {
  const double pixels_taps = static_cast<double>(s.N) * s.P * s.Q * s.taps();
  const int64_t out_count = mask.out_count(), in_count = mask.in_count(), Kg = s.K / s.G, Cg = s.channels_per_group();
  double dense = pixels_taps * s.K * Cg, live = pixels_taps * out_count * mask[kInPerGroup];
  if (s.G == 1) {
    dense = pixels_taps * whole_vectors(Kg) * whole_vectors(Cg);
    live = pixels_taps * whole_vectors(out_count) * whole_vectors(in_count);
  }
  // A gather moves the live channels, a scatter writes the full width; so for activations and for weights.
  const double out_pixels = static_cast<double>(s.N) * s.P * s.Q, in_pixels = static_cast<double>(s.N) * s.H * s.W;
  double copied =
      static_cast<double>(s.taps()) * (direction == Direction::grad_weight ? s.K * Cg : out_count * mask[kInPerGroup]);
  if (out_count < s.K) copied += out_pixels * (direction == Direction::forward ? s.K : out_count);
  if (in_count < s.C) copied += in_pixels * (direction == Direction::grad_input ? s.C : in_count);
  return live + copied * kMultiplyAddsPerElement < dense * kMargin;
}

}  // namespace prunekernels
