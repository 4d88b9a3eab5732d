// A bit for each element of a row of a weight, in the order of memory: set if the element is live.
#pragma once

#include <cstdint>

namespace prunekernels {

inline int64_t bit_words(int64_t elements) { return (elements + 31) / 32; }

// pairs (a bit per channel) -> bits of a row [channels, taps], or [taps, channels] if channels_last. Bits past the end
// are 0.
void spread_bits(const uint32_t* pairs, int64_t channels, int64_t taps, bool channels_last, uint32_t* bits);

// bits[k] = filter k is live; slots as in the mask table.
void slot_bits(const int32_t* out_slot, int64_t filters, uint32_t* bits);

}  // namespace prunekernels
