// How the cells of one operand channel that a tile of outputs reads lie in shared memory: `images` pieces, each of
// `rows` rows of `columns` cells. A strided axis is taken apart into `phases` of columns, so that lanes which are
// neighbours in the output read neighbouring cells, whatever the stride. The pitches avoid bank conflicts.
#pragma once

#include <algorithm>

#include "core/conv_shape.h"
#include "cuda/kernels/ptx.cuh"

namespace prunekernels {

constexpr int kSparseThreads = 256, kSparseWarps = kSparseThreads / kWarp;
constexpr size_t kSparseShared = 96 << 10;  // bytes; every architecture from sm_80 on has them
constexpr int kPatch = 4;                   // a thread's outputs along a row (and, where it has several rows, down)
constexpr int kSparseTaps = 32;             // of an axis, at most

// A 1x1 convolution may take a plane for kPatch long rows, so that no lane idles at the ends of rows.
inline ConvShape fold_pixelwise(ConvShape s) {
  const bool pixelwise = s.taps() == 1 && s.stride[0] == 1 && s.stride[1] == 1 && !s.padding[0] && !s.padding[1];
  const int64_t pixels = s.in_pixels();
  if (!pixelwise || pixels % (kPatch * 4)) return s;
  s.H = s.P = kPatch, s.W = s.Q = pixels / kPatch;
  return s;
}

inline int odd_multiple(int n, int unit) {
  const int units = (n + unit - 1) / unit;
  return (units | 1) * unit;
}

struct SparseTile {
  int across_log2, down_log2, images;  // of a warp: lanes along a row of outputs, rows of lanes, pieces
  int rows, columns;                   // cells of a piece
  int phases, phase_pitch, pitch, image_pitch, cells;

  PK_HOST_DEVICE int across() const { return 1 << across_log2; }
  PK_HOST_DEVICE int down() const { return 1 << down_log2; }

  // Cells copied for a channel. 7 cells are added to each row for what memory fetches in vain at its ends.
  int64_t copied() const { return int64_t{images} * rows * (columns + 7); }

  struct Cell {
    int image, row, column;  // column < 0: no output reads it
  };
  PK_DEVICE Cell cell(int place) const {
    const int image = place / image_pitch, in_image = place % image_pitch;
    const int row = in_image / pitch, in_row = in_image % pitch, phase = in_row / phase_pitch;
    const int column = in_row % phase_pitch * phases + phase;
    const bool read = image < images && row < rows && phase < phases && column < columns;
    return {image, row, read ? column : -1};
  }

  // For windows: a lane reads the cells of 4 outputs at once, 16 bytes. Eight lanes at a time must hit different banks.
  static SparseTile in_vectors(int across_log2, int down_log2, int images, int rows, int columns) {
    SparseTile t{across_log2, down_log2, images, rows, (columns + 1) & ~1, 1, 0, 0, 0, 0};
    t.phase_pitch = t.pitch = odd_multiple(t.columns, 4);
    t.image_pitch = odd_multiple(rows * t.pitch, std::min(4 << across_log2, 16));
    t.cells = images * t.image_pitch;
    return t;
  }
  // For any taps: a lane reads single cells; rows of lanes are `row_step` rows of cells apart.
  static SparseTile in_cells(int across_log2, int down_log2, int images, int rows, int columns, int row_step,
                             int column_step) {
    SparseTile t{across_log2, down_log2, images, rows, columns, column_step, 0, 0, 0, 0};
    t.phase_pitch = (columns + column_step - 1) / column_step;
    t.pitch = odd_multiple(t.phase_pitch * column_step, std::max(1, t.across() / (row_step & -row_step)));
    t.image_pitch = odd_multiple(rows * t.pitch, std::min(t.across() * t.down(), kWarp));
    t.cells = (images * t.image_pitch + 3) / 4 * 4;
    return t;
  }
};

}  // namespace prunekernels
