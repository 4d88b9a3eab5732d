// The algorithms that can serve a layer, and what each costs when nothing was measured.
//   dense    where-mask the weights, run the vendor's convolution at full width
//   compact  gather live channels -> vendor's convolution of the live sizes -> scatter, in batch chunks
//   direct   kernels of our own that read and write live channels in place
//   sparse   kernels of our own that skip single dead kernels
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/conv_shape.h"
#include "core/mask_table.h"

namespace prunekernels {

enum class Direction : int32_t { forward, grad_input, grad_weight };
constexpr const char* kDirectionNames[] = {"forward", "grad_input", "grad_weight"};

enum class Plan : int32_t { dense, compact, direct, sparse };
constexpr Plan kPlans[] = {Plan::dense, Plan::compact, Plan::direct, Plan::sparse};
constexpr const char* kPlanNames[] = {"dense", "compact", "direct", "sparse"};

inline const char* name_of(Plan plan) { return kPlanNames[static_cast<int>(plan)]; }
inline const char* name_of(Direction direction) { return kDirectionNames[static_cast<int>(direction)]; }

// How many multiply-adds the vendor's convolution does in the time in which one element is copied through memory.
constexpr double kMultiplyAddsPerElement = 24;
// What one multiply-add of our own kernels costs, in the vendor's: with operands shared by several filters (direct),
// and without (sparse).
constexpr double kDirectCost = 1.15, kSparseCost = 2;
// The model chooses another plan than dense only if it should take at most this share of dense's time.
constexpr double kMargin = 0.95;
// From this share of live kernels on, every plan but dense is slower.
constexpr double kAlmostFull = 0.96;

// The vendor's kernels compute whole vectors of channels: 51 live ones cost as much as 64, 8 nearly as much as 16.
// Image inputs have kernels of their own.
inline int64_t whole_vectors(int64_t channels) { return channels < 8 ? channels : (channels + 15) / 16 * 16; }

inline double vendor_cost(const ConvShape& s, int64_t groups, int64_t out_per_group, int64_t in_per_group) {
  if (s.G == 1) out_per_group = whole_vectors(out_per_group), in_per_group = whole_vectors(in_per_group);
  return static_cast<double>(s.N) * s.P * s.Q * s.taps() * groups * out_per_group * in_per_group;
}

// How many elements the compact plan copies: a gather reads the live channels, a scatter writes the full width, and
// weights are packed and unpacked likewise.
inline double elements_copied(const ConvShape& s, const MaskTable& mask, Direction direction) {
  const int64_t out_count = mask.out_count(), in_count = mask.in_count();
  const double out_pixels = static_cast<double>(s.N) * s.P * s.Q, in_pixels = static_cast<double>(s.N) * s.H * s.W;
  double copied = static_cast<double>(s.taps()) *
                  (direction == Direction::grad_weight ? s.K * s.channels_per_group() : out_count * mask[kInPerGroup]);
  if (out_count < s.K) copied += out_pixels * (direction == Direction::forward ? s.K : out_count);
  if (in_count < s.C) copied += in_pixels * (direction == Direction::grad_input ? s.C : in_count);
  return copied;
}

// The cost of a plan, in multiply-adds of the vendor's convolution.
inline double cost(Plan plan, const ConvShape& s, const MaskTable& mask, Direction direction) {
  switch (plan) {
    case Plan::dense:
      return vendor_cost(s, s.G, s.K / s.G, s.channels_per_group());
    case Plan::compact:
      return vendor_cost(s, mask[kLiveGroups], mask[kOutPerGroup], mask[kInPerGroup]) +
             elements_copied(s, mask, direction) * kMultiplyAddsPerElement;
    case Plan::direct:
      return kDirectCost * s.N * s.out_pixels() * s.taps() * mask.out_count() * mask[kInPerGroup] +
             elements_copied(s, mask, direction) * kMultiplyAddsPerElement / 2;
    case Plan::sparse:
      return kSparseCost * s.N * s.out_pixels() * s.taps() * mask[kLivePairs] +
             elements_copied(s, mask, direction) * kMultiplyAddsPerElement / 2;
  }
  return 0;
}

inline bool almost_full(const MaskTable& mask) {
  return mask[kLivePairs] >= kAlmostFull * static_cast<double>(mask[kFilters] * mask.channels_per_group());
}

}  // namespace prunekernels
