// Copies weights from full width [K, C / G, R, S] to the compact convolution's
// [live_groups * out_per_group, in_per_group, R, S], and its gradient back.
#pragma once

#include <cstdint>

#include "core/mask_table.h"
#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

struct WeightLayout {  // strides in elements; taps of an OHWI tensor are Cg apart, of an OIHW tensor 1
  int64_t row, channel, tap;
};

// columns: the live channels where one list serves every row (one group, no single dead kernels, no padding); else
// null. With such a list, rows of channel stride 1 are moved by the vector copies of gather_scatter.h.
struct WeightMove {
  const MaskTable& mask;
  const ChannelList* columns;
  WeightLayout full, compact;
  int64_t taps;
};

// compact[i, j, t] = full[out_index[i], in_index[j], t] where that kernel is live, else 0. Rows begin..end of the
// compact tensor.
template <typename T>
void pack_weight(const T* full, T* compact, const WeightMove& move, int64_t begin, int64_t end);

// full[k, c, t] = compact[out_slot[k], in_slot[c], t] * scale[k] where that kernel is live, else 0. Rows begin..end of
// the full tensor. Null scale: 1. A scale of 0 gives exact zeros, whatever the gradient holds.
template <typename T>
void unpack_grad_weight(const T* compact, T* full, const WeightMove& move, const float* scale, int64_t begin,
                        int64_t end);

// to[k, c, t] = from[k, c, t] * scale[k] where that kernel is live, else 0. In place if to == from. Null mask: all
// live.
template <typename T>
void mask_weight(const T* from, T* to, const WeightLayout& layout, int64_t channels, int64_t taps,
                 const MaskTable* mask, const float* scale, int64_t begin, int64_t end);

// Whether every dead kernel of rows begin..end already holds zeros, so that mask_weight would change nothing.
template <typename T>
bool dead_weights_are_zero(const T* full, const WeightLayout& layout, int64_t taps, const MaskTable& mask,
                           int64_t begin, int64_t end);

}  // namespace prunekernels
