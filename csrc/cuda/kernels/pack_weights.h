// Copies weights from full width [K, C / G, R, S] to the compact convolution, and its gradient back, for many layers in
// one launch.
//
//   pack_weights         packed[i, t, j] = full[out_index[i], in_index[j], t] where that kernel is live, else 0
//   unpack_grad_weight   full[k, c, t]   = grad_scale[k] * sum over slices of packed[out_slot[k], t, in_slot[c]] where
//                                          that kernel is live and the scale is not 0, else 0
//
// Least cost: live rows and columns read once, the result written once. Weights are small, so the launch costs most,
// and one launch serves many layers (about 30: as many descriptors as kernel parameters hold). Large layers are bound
// by memory sectors: lanes lie along packed columns, which in a contiguous full weight are R S elements apart. A small
// gradient of many slices (1x1 layers: up to 264 on 132 multiprocessors) would be bound by latency: its slices are cut
// into up to 8 parts, and a thread has 16 loads in flight.
#pragma once

#include "core/mask_table.h"
#include "cuda/kernels/stream.h"

namespace prunekernels {

// The order of packed[i, t, j] in memory: row i, tap t, column j.
enum class PackLayout : int32_t {
  rows,      // [rows, taps, columns]: igemm_fwd, igemm_grad_weight, a channels_last compact weight
  columns,   // [columns, taps, rows]: igemm_grad_input (one group)
  channels,  // [rows, columns, taps]: a contiguous compact weight
};

// A mask table on the device, and copies of the numbers in its header that the host and the kernels need.
struct PackMask {
  const int32_t* words;                              // device mask table (core/mask_table.h)
  int32_t filters, channels_per_group, groups;       // K, C / G, G
  int32_t live_groups, out_per_group, in_per_group;  // as in the table's header
};
// From the table on the host (host_words) and the same table on the device (device_words).
PackMask pack_mask(const int32_t* host_words, const int32_t* device_words);

struct WeightStrides {  // of the full weight, in elements; contiguous: {Cg T, T, 1}, channels_last: {T Cg, 1, Cg}
  int64_t row, channel, tap;
};

struct PackJob {  // one layer
  PackMask mask;
  int32_t taps;  // R * S
  PackLayout layout;
  int32_t rows_per_group;  // >= out_per_group; the rest are zero rows
  int32_t columns;         // >= in_per_group; the rest are zero columns
  WeightStrides strides;

  Element full_element;
  const void* full;  // device [K, C / G, R, S], any strides
  void* packed;      // device [live_groups * rows_per_group, taps, columns] in the order of `layout`
};

// jobs: host array of `count`. packed: the type of packed elements (tf32: f32 rounded to tf32). Up to 2^31 elements a
// layer.
cudaError_t launch_pack_weights(const PackJob* jobs, int64_t count, Element packed, bool tf32, cudaStream_t stream);

struct UnpackJob {  // one layer
  PackMask mask;
  int32_t taps;
  PackLayout layout;  // rows or channels
  int32_t rows_per_group, columns;
  WeightStrides strides;
  int32_t splits;  // slices of packed; the order in which they are added depends on their number alone
  int64_t slice;   // elements between slices

  Element packed_element;
  const void* packed;       // device [splits][live_groups * rows_per_group, taps, columns]
  const float* grad_scale;  // device [K]; null: 1. A scale of 0 gives exact zeros, whatever the gradient holds
  void* full;               // device [K, C / G, R, S], any strides
};

// Writes every element of `full`, zeros where dead. Entries of packed that belong to no live kernel are not read.
cudaError_t launch_unpack_grad_weight(const UnpackJob* jobs, int64_t count, Element full, cudaStream_t stream);

}  // namespace prunekernels
