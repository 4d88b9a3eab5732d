// Kernel parameters of the convolutions of igemm.h. The reduction runs over vectors: 16 bytes of listed operand
// channels at one tap.
#pragma once

#include "cuda/kernels/fast_divide.cuh"
#include "cuda/kernels/igemm.h"

namespace prunekernels {

constexpr int kMaxStride = 8;
constexpr int kMaxTaps = 15;                  // of the kernel along an axis: a pixel has a bit for each, and two more
constexpr size_t kMaxSharedBytes = 99 << 10;  // of a block, whatever the architecture from sm_80 on

// One axis of one class of results (core/conv_axes.h). A class's taps are in arithmetic progression.
struct AxisWalk {
  int32_t first, every, count;  // results first, first + every, ...
  int32_t taps;                 // number
  int32_t tap, tap_step;        // of the kernel
  int32_t at, at_step;          // operand position that result 0 reads through it
};

struct ConvolveParams {
  const void* operand;          // [images, operand_rows, operand_columns, channels]
  const void* weight;           // [>= to_live, kernel_taps, packed_channels]
  const void* bias;             // [result_channels] or null
  void* result;                 // [images, result_rows, result_columns, result_channels]
  const int32_t* from_index;    // [from_live] or null
  const int32_t* to_index;      // [to_live] or null
  const int32_t* to_slot;       // [result_channels] or null
  const int32_t* list_first;    // [tiles + 1]
  const int32_t* list_vectors;  // packed vectors of each tile

  int32_t images;
  int32_t operand_rows, operand_columns, pixel_bytes;  // of the operand, from one pixel to the next
  int32_t result_rows, result_columns, result_channels;
  int32_t from_live, to_live;
  int32_t from_listed;  // from_live, or 0 without a list
  int32_t kernel_columns, packed_channels;
  int32_t filter_elements;  // kernel_taps * packed_channels: from one filter's weights to the next
  int32_t tiles;            // of result channels, at least 1
  int32_t step[2];          // operand positions from one result to the next
  int32_t classes[2];       // of rows, of columns
  bool wide_stores;         // pixels of the result begin at multiples of 16 bytes
  AxisWalk rows[kMaxStride], columns[kMaxStride];
};

struct GradWeightParams {
  const void* grad_out;          // [images, out_rows, out_columns, filters of full width]
  const void* x;                 // [images, in_rows, in_columns, channels of full width]
  float* partial;                // [splits, filters, kernel_taps, packed_channels]
  const int32_t* filter_index;   // [filters] or null
  const int32_t* channel_index;  // [channels] or null
  const int32_t* list_first;     // [filter tiles + 1]
  const int32_t* list_vectors;   // packed vectors of channels of each filter tile

  int32_t images, out_rows, out_columns, in_rows, in_columns;
  int32_t out_bytes, in_bytes;  // from one pixel to the next
  int32_t filters, channels, packed_channels;
  int32_t kernel_rows, kernel_columns, kernel_taps;
  int32_t stride[2], padding[2];
  FastDivide dilation[2];
  int32_t chunks;                                   // of pixels, in all splits
  int32_t chunk_images, chunk_rows, chunk_columns;  // a chunk's pixels as images, rows of an image, columns of a row
};

}  // namespace prunekernels
