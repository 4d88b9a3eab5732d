// Loads the operands of a convolution into shared memory, one chunk of the reduction at a time.
//   vectors   for channel lists of aligned 16-byte runs: cp.async of 16 bytes, kStages - 1 chunks ahead
//   elements  for any list: 4-byte elements by cp.async; 2-byte elements through registers, loaded before a chunk is
//             multiplied and stored after it. Lanes lie along the channels, so that they share memory sectors
// Weights are packed and always loaded as vectors. Dead channels, padding and anything beyond the tile become zeros
// without being read.
#pragma once

#include "cuda/kernels/igemm_params.h"
#include "cuda/kernels/igemm_warp.cuh"

namespace prunekernels {

// A block's tile: kM pixels x kN result channels, by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kBlocks_>
struct BlockTile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static_assert(kM % (16 * kWarpsM) == 0 && kN % (16 * kWarpsN) == 0);
};

// The operand position that a result pixel would read through a tap with offset 0.
struct Pixel {
  int32_t index;   // (image * rows + row) * columns + column
  int32_t corner;  // row << 16 | column; kNowhere: no tap is inside
};
constexpr int32_t kNowhere = static_cast<int32_t>(0x80000000);

PK_DEVICE bool reaches(const ConvolveParams& p, int32_t corner, int at_row, int at_column) {
  return static_cast<uint32_t>((corner >> 16) + at_row) < static_cast<uint32_t>(p.operand_rows) &&
         static_cast<uint32_t>(static_cast<int16_t>(corner) + at_column) < static_cast<uint32_t>(p.operand_columns);
}

// A thread's position in the reduction. It goes through the taps one by one, and through the vectors of each tap in
// steps of kChunkVectors.
template <typename T, bool kListed, int kOwn>
struct Walk {
  const int32_t* list;  // vectors of this tile, if kListed
  int vectors;          // of a tap
  int place;            // among them
  int columns_left, rows_left;
  int at_row, at_column, tap;
  int vector;         // packed
  int channel[kOwn];  // the thread's channels of the vector, -1: none. Looked up a step before they are needed

  PK_DEVICE Walk(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int tile, int first,
                 int within)
      : place(first), columns_left(columns.taps), rows_left(columns.taps == 0 ? 0 : rows.taps) {
    list = nullptr;
    vectors = (p.from_live + kVector<T> - 1) / kVector<T>;
    if constexpr (kListed) {
      list = p.list_vectors + p.list_first[tile];
      vectors = p.list_first[tile + 1] - p.list_first[tile];
    }
    if (vectors == 0) rows_left = 0;
    at_row = rows.at, at_column = columns.at;
    tap = rows.tap * p.kernel_columns + columns.tap;
    settle(p, rows, columns, within);
  }

  PK_DEVICE int steps(const AxisWalk& rows, const AxisWalk& columns) const {
    return (rows.taps * columns.taps * vectors + kChunkVectors - 1) / kChunkVectors;
  }
  PK_DEVICE bool done() const { return rows_left <= 0; }
  PK_DEVICE void advance(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int within) {
    place += kChunkVectors;
    settle(p, rows, columns, within);
  }

 private:
  PK_DEVICE void settle(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int within) {
    while (place >= vectors && !done()) {
      place -= vectors;
      tap += columns.tap_step, at_column += columns.at_step;
      if (--columns_left > 0) continue;
      columns_left = columns.taps;
      --rows_left;
      tap += rows.tap_step * p.kernel_columns - columns.taps * columns.tap_step;
      at_row += rows.at_step, at_column = columns.at;
    }
    if (done()) {  // later values are never used, but must not overflow
      tap = vector = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) channel[i] = -1;
      return;
    }
    vector = kListed ? list[place] : place;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int position = vector * kVector<T> + within + i;
      channel[i] = position >= p.from_live ? -1 : p.from_index ? p.from_index[position] : position;
    }
  }
};

// ---- the operand: kM pixels

template <typename T, typename Tile, bool kVectors>
struct OperandLoader {  // vectors
  static constexpr int kOwn = 1, kParts = 1;
  static constexpr int kLines = Tile::kThreads / kChunkVectors, kRows = Tile::kM / kLines;
  static_assert(Tile::kM % kLines == 0 && kLines % 8 == 0, "a thread's rows share a swizzle");
  Pixel pixels[kRows];

  PK_DEVICE static int vector() { return threadIdx.x % kChunkVectors; }
  PK_DEVICE static int within() { return 0; }
  PK_DEVICE static int weight_line() { return threadIdx.x / kChunkVectors; }
  PK_DEVICE explicit OperandLoader(Shared<Pixel> table) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) pixels[i] = table.get(threadIdx.x / kChunkVectors + i * kLines);
  }

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to, Shared<Pixel>, int) {
    const int shift = walk.at_row * p.operand_columns + walk.at_column;
    const T* from = static_cast<const T*>(p.operand) + max(walk.channel[0], 0);  // aligned, used or not
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool valid = walk.channel[0] >= 0 && reaches(p, pixels[i].corner, walk.at_row, walk.at_column);
      const int row = threadIdx.x / kChunkVectors + i * kLines;
      cp_async<16>(to.address(row_place<T>(row, vector())),
                   from + static_cast<int64_t>(pixels[i].index + shift) * p.operand_channels, valid);
    }
  }
  PK_DEVICE void finish(Shared<T>, int) {}
};

template <typename T, typename Tile>
struct OperandLoader<T, Tile, false> {  // elements: 16 lanes a row, a word each
  static constexpr int kOwn = 4 / sizeof(T);
  static constexpr int kWords = kChunkVectors * 4, kLines = Tile::kThreads / kWords, kRows = Tile::kM / kLines;
  static constexpr bool kByRegisters = sizeof(T) == 2;
  static constexpr int kParts = kByRegisters && kRows > 8 ? kRows / 8 : 1, kPartRows = kRows / kParts;
  static constexpr int kUnroll = kByRegisters ? kPartRows : 4;
  static_assert(Tile::kM % kLines == 0 && kRows % kParts == 0 && kParts <= kSlices);
  T values[kByRegisters ? kPartRows * kOwn : 1];

  PK_DEVICE static int vector() { return threadIdx.x / 4 % kChunkVectors; }
  PK_DEVICE static int within() { return threadIdx.x % 4 * kOwn; }
  // Any assignment of the weights' rows serves in which a thread keeps its vector.
  PK_DEVICE static int weight_line() { return threadIdx.x / 16 * 4 + threadIdx.x % 4; }
  PK_DEVICE explicit OperandLoader(Shared<Pixel>) {}

  PK_DEVICE static int row(int part, int i) { return threadIdx.x / kWords + (part * kPartRows + i) * kLines; }
  PK_DEVICE static int element(int row) { return row_place<T>(row, vector()) + within(); }

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to, Shared<Pixel> table, int part) {
    const int shift = walk.at_row * p.operand_columns + walk.at_column;
#pragma unroll kUnroll
    for (int i = 0; i < kPartRows; ++i) {
      const Pixel pixel = table.get(row(part, i));
      const bool valid = reaches(p, pixel.corner, walk.at_row, walk.at_column);
      const T* from = static_cast<const T*>(p.operand) + static_cast<int64_t>(pixel.index + shift) * p.operand_channels;
      if constexpr (kByRegisters) {
#pragma unroll
        for (int e = 0; e < kOwn; ++e)
          values[i * kOwn + e] = valid && walk.channel[e] >= 0 ? from[walk.channel[e]] : T{0};
      } else {
        cp_async<4>(to.address(element(row(part, i))), from + walk.channel[0], valid && walk.channel[0] >= 0);
      }
    }
  }
  PK_DEVICE void finish(Shared<T> to, int part) {
    if constexpr (kByRegisters)
#pragma unroll
      for (int i = 0; i < kPartRows; ++i)
        to.set_vector(element(row(part, i)),
                      static_cast<uint32_t>(values[2 * i].bits) | static_cast<uint32_t>(values[2 * i + 1].bits) << 16);
  }
};

// ---- the weights: kN filters

template <typename T, typename Tile>
struct WeightLoader {
  static constexpr int kLines = Tile::kThreads / kChunkVectors;
  static constexpr int kRows = (Tile::kN + kLines - 1) / kLines;
  int first, line;

  PK_DEVICE WeightLoader(int first_filter, int line) : first(first_filter), line(line) {}

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to, int vector) const {
    const T* from = static_cast<const T*>(p.weight) + walk.tap * p.packed_channels + walk.vector * kVector<T>;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = line + i * kLines;
      if (Tile::kN % kLines != 0 && row >= Tile::kN) break;
      const bool valid = first + row < p.to_live && !walk.done();
      cp_async<16>(to.address(row_place<T>(row, vector)),
                   from + static_cast<int64_t>(first + row) * p.kernel_taps * p.packed_channels, valid);
    }
  }
};

}  // namespace prunekernels
