// The inner loops of the sparse plan on pixels: NHWC, bfloat16, sums in float. Four results (a quad) share a list of
// operands, and neighbouring pixels lie in the lanes of a vector: operands were copied into planes before. A word has
// 32 bits: two bfloat16 that are multiplied and added together, two channels of a pixel or two pixels of a channel.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kQuad = 4;
constexpr int kQuadLanes = 16;    // words of a vector
constexpr int kQuadVectors = 6;   // of pixels: of a tile of a convolution
constexpr int kQuadOperands = 6;  // of a tile of a weight gradient

// One call of a convolution: a tile of a few vectors of positions p for four results i.
//   sum[i][p] = start[i] + sum over pairs j of channels and taps t of weights[j][t][i] . x[pairs[j] + taps[t] + p]
// Rounded, results 0 and 1 are the two halves of y[p], results 2 and 3 those of y[y_plane + p]. Distances are in words.
struct QuadTile {
  const uint32_t* x;
  const int32_t *pairs, *taps;
  int64_t pair_count, tap_count;
  const uint32_t* weights;
  const float* start;
  uint32_t* y;
  int64_t y_plane;
};

// One call of a weight gradient: four output gradients f with a few operands j (`xs` of them).
//   out[f * xs + j] += sum over positions p, `vectors` vectors of pairs of them, of g[f][p] * x[j][p]
struct QuadDots {
  const uint16_t* const* g;
  const uint16_t* const* x;
  int64_t vectors;
  float* out;
};

// A row of pixels with zeros on both sides.
struct PaddedRow {
  const uint16_t* pixels;
  int64_t pixel;  // elements from one to the next
  int64_t left, count, right;
  int64_t length() const { return left + count + right; }
};

struct QuadKernels {
  using Conv = void (*)(const QuadTile&);
  using Dots = void (*)(const QuadDots&);

  Conv conv[kQuadVectors + 1];   // [vectors]
  Dots dots[kQuadOperands + 1];  // [xs]

  // to[places[j] * plane + i] = channels 2 j and 2 j + 1 of pixel i, unless the place is negative. Null places: j.
  void (*to_pair_planes)(const PaddedRow& row, int64_t pairs, const int32_t* places, uint32_t* to, int64_t plane);
  // to[places[c] * plane + i] = channel c of pixel i. Where the row's length is odd, a zero more.
  void (*to_planes)(const PaddedRow& row, int64_t channels, const int32_t* places, uint16_t* to, int64_t plane);
  // Back: channels 2 j and 2 j + 1 of pixel i = from[j * plane + i]. Writes whole vectors of pairs, and reads them.
  void (*to_pixels)(const uint32_t* from, int64_t plane, int64_t pairs, int64_t count, uint16_t* to, int64_t pixel);
};

const QuadKernels& quad_kernels();  // the best the instruction set in force allows

}  // namespace prunekernels
