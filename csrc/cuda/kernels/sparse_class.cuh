// One class of outputs of sparse_fwd or sparse_grad_input as the kernel takes it (sparse_correlation.cuh), and how its
// blocks divide their shared memory.
#pragma once

#include "core/conv_shape.h"
#include "core/sparse_lists.h"
#include "cuda/kernels/fast_divide.cuh"
#include "cuda/kernels/sparse_tile.cuh"

namespace prunekernels {

bool sparse_correlation_serves(const ConvShape& shape);  // of sparse_serves(): sparse_fwd and sparse_grad_input

constexpr int kSparseStages = 3;
constexpr int kMostStaged = 4;   // steps of a stage
constexpr int kWindowTaps = 9;   // at most
constexpr int kListSteps = 256;  // steps of the list that shared memory holds at a time
constexpr int kStepWords = sizeof(SparseStep) / 4;

struct SparseClass {
  SparseTile tile;
  int images, operands, results;      // N, channels of the operand and of the result
  int operand_rows, operand_columns;  // planes
  int result_rows, result_columns;
  int rows, columns;  // outputs of the class
  int first_row, first_column, every_row, every_column;
  int step_row, step_column, low_row, low_column;
  int spread_row, spread_column;  // cell i of a tile that begins with output o lies at spread * (step * o + i) + low
  FastDivide blocks, tiles_across, tiles_down;
  const int32_t *order, *begin;  // the lists
  const SparseStep* steps;
  int64_t result_stride, operand_stride;  // of the weight, in floats
  int weight_results;                     // results on the weight's axis: the same indices serve each group
  int staged;                             // steps of a stage
  int patch_rows;  // rows of a thread's outputs: kPatch, or fewer where their cells do not fit (any taps)
  int vector;      // outputs that are stored at once: 4, 2, 1
  int taps_down, taps_across;
  int tap_weight[kWindowTaps];  // windows: floats from a kernel's start, down a row after a row
  // any taps: cells that output 0 reads; floats from a kernel's start
  int row_at[kSparseTaps], column_at[kSparseTaps], row_weight[kSparseTaps], column_weight[kSparseTaps];
};

// Where the parts of a block's shared memory begin, in words.
template <int kR, int kS, int kResults>
struct SparseRooms {
  static constexpr int kParts = kBlockResults / (kSparseWarps * kResults);
  static constexpr int kTaps = kR * kS, kWeightPitch = (kTaps + 3) / 4 * 4;
  int source = 0, steps, stages, stage_words, weights;

  PK_HOST_DEVICE SparseRooms(int cells, int staged)
      : steps(cells), stages(steps + kListSteps * kStepWords), weights(cells * staged) {
    stage_words = weights + staged * kSparseWarps * kResults * kWeightPitch;
  }
  size_t bytes() const { return static_cast<size_t>(stages + kSparseStages * stage_words) * 4; }
};

}  // namespace prunekernels
