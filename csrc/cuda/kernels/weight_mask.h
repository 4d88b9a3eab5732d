// The mask of a layer's weights, as kernels that pass over its rows take it.
#pragma once

#include <cstdint>

namespace prunekernels {

// A null pointer: everything is live. A row has D = channels * taps elements; of a vector (a bias) both are 1.
struct WeightMask {
  const int32_t* out_slot;  // [filters]; < 0: the whole filter is dead
  const uint32_t* pairs;    // [filters, ceil(channels / 32)]; a bit per kernel, as in the mask table
  int32_t filters;          // K
  int32_t channels;         // C / G
  int32_t taps;             // R * S
  bool channels_last;       // rows are [taps, channels]; else [channels, taps]
};

}  // namespace prunekernels
