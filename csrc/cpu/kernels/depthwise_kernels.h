// The inner loops of depthwise convolutions. What the lanes of a vector hold:
//   columns   neighbouring outputs of one channel (NCHW)
//   channels  one output of as many channels (NHWC)
// Taps of one column in successive rows make a part: what is read for one output is read for those above and below it
// too, so each vector of the operand is loaded once for all taps of a part.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kMostPartRows = 5;
constexpr int kMostTileRows = 8, kMostTileVectors = 4;

struct DepthwisePart {
  int64_t offset;         // where the part's first tap reads, in floats from the output's position
  int64_t rows;           // taps, 1 to kMostPartRows; each reads a row below the one before
  int64_t tap, tap_step;  // which tap the first one is, r * S + s, and from one to the next
};

// One call of a convolution: a tile of rows r of vectors v of outputs.
//   y[r][v] = start + sum over parts and rows i of them of weights[tap + i * tap_step] * x[offset][r + i][v]
// Vectors of a row are x_vector and y_vector floats apart, where lanes are channels; else they are neighbours.
struct DepthwiseTile {
  const float* x;
  int64_t x_row, x_vector;
  const DepthwisePart* parts;
  int64_t part_count;
  const float *weights, *start;  // by tap numbers, or vectors where lanes are channels
  float* y;
  int64_t y_row, y_vector;
  int last;            // lanes that are written: of the last vector of a row; of all, where lanes are channels
  int64_t whole_rows;  // so many rows may be written with the other lanes, too: later tiles overwrite them
  uint32_t live;       // where lanes are channels: a bit for each that is written, the others are zeros
};

// One call of a weight gradient. Sums are vectors, whose lanes are still to be added up unless they are channels.
//   sums[tap + i * tap_step] += sum over rows r and vectors v of g[r][v] * x[offset][r + i][v]
struct DepthwiseDots {
  const float *g, *x;
  int64_t g_row, g_vector, x_row, x_vector;
  const DepthwisePart* parts;
  int64_t part_count;
  float* sums;
  int last;            // lanes of the last vector of a row that count, where lanes are columns;
  int64_t whole_rows;  // in so many rows the others may be read from g
};

struct DepthwiseTiles {
  using Conv = void (*)(const DepthwiseTile&);
  using Dots = void (*)(const DepthwiseDots&);

  int64_t most_rows[kMostTileVectors + 1];             // [vectors]
  Conv conv[kMostTileRows + 1][kMostTileVectors + 1];  // [rows][vectors]
  Dots dots[kMostTileRows + 1][kMostTileVectors + 1];
};

struct DepthwiseKernels {
  int lanes;
  DepthwiseTiles columns, channels;  // by what lanes are
  // out[i] += the sum of the lanes of sums[i]; reads a multiple of 16 vectors
  void (*add_lanes)(const float* sums, int64_t count, float* out);

  // `rows` rows of `count` floats; up to a vector of zeros is written behind each, before the next row is. end: where
  // memory ends that may be read.
  void (*copy_rows)(const float* from, int64_t from_row, int64_t rows, int64_t count, const float* end, float* to,
                    int64_t to_row);
  // The same, even[i] = from[2 i], odd[i] = from[2 i + 1]
  void (*split_rows)(const float* from, int64_t from_row, int64_t rows, int64_t count, const float* end, float* even,
                     float* odd, int64_t to_row);
  // to[2 i] = even[i], to[2 i + 1] = odd[i]; writes exactly `count` floats a row, may read a vector behind those of one
  void (*merge_rows)(const float* even, const float* odd, int64_t from_row, int64_t rows, int64_t count, float* to,
                     int64_t to_row);
};

const DepthwiseKernels& depthwise_kernels();  // the best the instruction set in force allows

}  // namespace prunekernels
