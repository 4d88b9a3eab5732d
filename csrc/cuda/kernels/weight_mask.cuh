// The mask of a row's weights, span by span.
#pragma once

#include "cuda/kernels/row_pass.cuh"
#include "cuda/kernels/weight_mask.h"

namespace prunekernels {

// Bit i: element i of the span is in the row, and its kernel is live. The filter must be live.
template <int kSpan>
PK_DEVICE uint32_t live_elements(const WeightMask& mask, int64_t filter, const Span<kSpan>& span) {
  if (!mask.pairs) return span.inside;
  const uint32_t* pairs = mask.pairs + filter * ((mask.channels + 31) / 32);
  const int stride = mask.channels_last ? 1 : mask.taps;  // from a channel to the next
  const int cut = span.first < 0 ? -span.first : 0;
  int channel = (span.first + cut) / stride, tap = (span.first + cut) - channel * stride;
  if (mask.channels_last) channel %= mask.channels;
  uint32_t live = 0;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    if (!(span.inside >> i & 1)) continue;
    live |= (pairs[channel >> 5] >> (channel & 31) & 1) << i;
    if (++tap == stride) {
      tap = 0;
      if (++channel == mask.channels) channel = 0;
    }
  }
  return live;
}

PK_DEVICE bool filter_lives(const WeightMask& mask, int64_t filter) {
  return !mask.out_slot || mask.out_slot[filter] >= 0;
}

}  // namespace prunekernels
