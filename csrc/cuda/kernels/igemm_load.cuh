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

  static constexpr int kDeep = kChunkVectors;  // vectors of a row: of the reduction, loaded at once
  static constexpr int kStages = 4;            // chunks in shared memory, a power of two
  static constexpr int kParts = 2;  // in which a thread loads elements at most, a slice multiplied after each
  template <typename T>
  PK_DEVICE static int place(int row, int vector) {
    return row_place<T>(row, vector);
  }
};
template <typename T, typename Tile>
constexpr int kRowElements = Tile::kDeep * kVector<T>;

// A pixel as the loaders see it. `outside` has a bit for each row and column of taps that fall outside the tensor, so
// that one AND tells whether a tap reads it.
struct alignas(8) Pixel {
  int32_t index;  // (image * rows + row) * columns + column at the first tap, whether there is such a position or not
  uint32_t outside;
};
constexpr uint32_t kMissing = 1u << 2 * kMaxTaps;  // set where there is no pixel
constexpr uint32_t kDeadChannel = kMissing << 1;   // set in every pixel: asked for, it stops all reads
constexpr Pixel kNoPixel{0, ~0u};

PK_DEVICE uint32_t row_bit(int tap) { return 1u << tap; }
PK_DEVICE uint32_t column_bit(int tap) { return 1u << (kMaxTaps + tap); }

// Bit i: position at + i * step is not one of size.
PK_DEVICE uint32_t outside_bits(int at, int step, int taps, int size) {
  uint32_t bits = 0;
  for (int i = 0; i < taps; ++i, at += step)
    bits |= static_cast<uint32_t>(static_cast<uint32_t>(at) >= static_cast<uint32_t>(size)) << i;
  return bits;
}

// A thread's position in the reduction: through kDeep vectors of channels at a time it goes through all taps, so that
// pixels which one tap has read are in the L1 cache for the next. The last block of vectors may be narrower; its
// vectors of all taps lie in a row, so that no step but the last has gaps.
template <typename T, bool kListed, bool kVectors, int kOwn, int kDeep>
struct Walk {
  const int32_t* list;   // vectors of this tile, if kListed
  int vectors;           // of a tap
  int first, width;      // of the block: its first vector, and how many it has
  int place;             // among them
  uint32_t row, column;  // bits of the tap; row 0: done
  int shift;             // from the first tap to this one, in pixels of the operand
  int weight;            // first element of the tap in a row of weights
  int vector;            // packed
  int channel[kOwn];     // the thread's channels of the vector, -1: none. Looked up a step before they are needed

  PK_DEVICE Walk(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int tile, int slot, int within)
      : first(0), place(slot) {
    list = nullptr;
    vectors = (p.from_live + kVector<T> - 1) / kVector<T>;
    if constexpr (kListed) {
      list = p.list_vectors + p.list_first[tile];
      vectors = p.list_first[tile + 1] - p.list_first[tile];
    }
    if (rows.taps * columns.taps == 0) vectors = 0;
    begin_block(p, rows, columns);
    settle(p, rows, columns, within);
  }

  PK_DEVICE int steps(const AxisWalk& rows, const AxisWalk& columns) const {
    return (rows.taps * columns.taps * vectors + kDeep - 1) / kDeep;
  }
  PK_DEVICE bool done() const { return row == 0; }
  // The bits of a pixel that forbid to read the thread's e-th channel. When done, all pixels have one of them.
  PK_DEVICE uint32_t forbidding(int e) const { return channel[e] < 0 ? kDeadChannel : row | column; }
  PK_DEVICE void advance(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int within) {
    place += kDeep;
    settle(p, rows, columns, within);
  }

 private:
  PK_DEVICE void begin_block(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns) {
    width = min(vectors - first, kDeep);
    row = width > 0 ? row_bit(0) : 0, column = width > 0 ? column_bit(0) : kDeadChannel;
    shift = 0, weight = (rows.tap * p.kernel_columns + columns.tap) * p.packed_channels;
  }
  PK_DEVICE void next_tap(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns) {
    column <<= 1, shift += columns.at_step, weight += columns.tap_step * p.packed_channels;
    if (column < column_bit(columns.taps)) return;
    row = row << 1 & (row_bit(rows.taps) - 1), column = column_bit(0);
    shift += rows.at_step * p.operand_columns - columns.taps * columns.at_step;
    weight += (rows.tap_step * p.kernel_columns - columns.taps * columns.tap_step) * p.packed_channels;
    if (row == 0) {
      first += kDeep;
      begin_block(p, rows, columns);
    }
  }
  PK_DEVICE void settle(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int within) {
    while (place >= width && !done()) {
      place -= width;
      next_tap(p, rows, columns);
    }
    const int at = first + place;
    vector = !kListed ? at : at < vectors ? list[at] : 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int position = vector * kVector<T> + within + i;
      channel[i] = position < p.from_listed ? p.from_index[position] : position < p.from_live ? position : -1;
    }
  }
};

// ---- the operand: kM pixels

// Where the walk's tap reads the channel at a pixel of index 0.
template <typename T, typename Walk>
PK_DEVICE const char* first_channel(const ConvolveParams& p, const Walk& walk, int channel) {
  const auto* at_first_tap = reinterpret_cast<const char*>(kept(static_cast<const T*>(p.operand) + channel));
  return kept(at_first_tap + static_cast<int64_t>(walk.shift) * p.pixel_bytes);
}

template <typename T, typename Tile, bool kVectors>
struct OperandLoader {  // vectors
  static constexpr int kOwn = 1, kParts = 1;
  static constexpr int kLines = Tile::kThreads / Tile::kDeep, kRows = Tile::kM / kLines;
  static constexpr bool kHold = sizeof(T) == 2;  // with floats there are no registers to spare
  static_assert(Tile::kM % kLines == 0 && kLines % 8 == 0, "a thread's rows share a swizzle");
  int place;             // of its first row in the tile
  Shared<Pixel> pixels;  // from that row on
  Pixel held[kHold ? kRows : 1];

  PK_DEVICE static int vector() { return threadIdx.x % Tile::kDeep; }
  PK_DEVICE static int within() { return 0; }
  PK_DEVICE static int weight_line() { return threadIdx.x / Tile::kDeep; }
  PK_DEVICE explicit OperandLoader(Shared<Pixel> table)
      : place(Tile::template place<T>(threadIdx.x / Tile::kDeep, vector())), pixels(table + threadIdx.x / Tile::kDeep) {
    if constexpr (kHold)
#pragma unroll
      for (int i = 0; i < kRows; ++i) held[i] = pixels.get(i * kLines);
  }

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to, int) {
    const char* from = first_channel<T>(p, walk, max(walk.channel[0], 0));  // aligned, used or not
    const uint32_t forbidding = walk.forbidding(0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Pixel pixel = kHold ? held[kHold ? i : 0] : pixels.get(i * kLines);
      const int index = kHold ? kept(pixel.index) : pixel.index;
      cp_async<16, true>(to.address(place + i * kLines * kRowElements<T, Tile>),
                         from + static_cast<int64_t>(index) * p.pixel_bytes, (pixel.outside & forbidding) == 0);
    }
  }
  PK_DEVICE void finish(Shared<T>, int) {}
};

template <typename T, typename Tile>
struct OperandLoader<T, Tile, false> {  // elements: a lane for each word of a row
  static constexpr int kOwn = 4 / sizeof(T);
  static constexpr int kWords = Tile::kDeep * 4, kLines = Tile::kThreads / kWords, kRows = Tile::kM / kLines;
  static constexpr bool kByRegisters = sizeof(T) == 2;
  static constexpr int kParts = kByRegisters && kRows > 8 ? Tile::kParts : 1, kPartRows = kRows / kParts;
  static_assert(Tile::kM % kLines == 0 && kRows % kParts == 0);
  static_assert(kLines % 8 == 0, "a thread's rows share a swizzle");
  int place;             // of its first row in the tile
  Shared<Pixel> pixels;  // from that row on
  uint32_t values[kByRegisters ? kPartRows * kOwn : 1];

  PK_DEVICE static int vector() { return threadIdx.x / 4 % Tile::kDeep; }
  PK_DEVICE static int within() { return threadIdx.x % 4 * kOwn; }
  // Any assignment of the weights' rows serves in which a thread keeps its vector.
  PK_DEVICE static int weight_line() { return threadIdx.x / kWords * 4 + threadIdx.x % 4; }
  PK_DEVICE explicit OperandLoader(Shared<Pixel> table)
      : place(kept(Tile::template place<T>(threadIdx.x / kWords, vector()) + within())),
        pixels(table + kept(threadIdx.x / kWords)) {}

  PK_DEVICE int element(int part, int i) const {
    return place + (part * kPartRows + i) * kLines * kRowElements<T, Tile>;
  }

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to, int part) {
    const char* from = first_channel<T>(p, walk, walk.channel[0]);
    const uint32_t forbidding = walk.forbidding(0), forbidding_second = walk.forbidding(kOwn - 1);
    const int64_t second = (walk.channel[kOwn - 1] - walk.channel[0]) * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kPartRows; ++i) {
      const Pixel pixel = pixels.get((part * kPartRows + i) * kLines);
      const char* at = from + static_cast<int64_t>(pixel.index) * p.pixel_bytes;
      const bool valid = (pixel.outside & forbidding) == 0;
      if constexpr (kByRegisters) {
        values[2 * i] = load_two_bytes(at, valid);
        values[2 * i + 1] = load_two_bytes(at + second, (pixel.outside & forbidding_second) == 0);
      } else {
        cp_async<4>(to.address(element(part, i)), at, valid);
      }
    }
  }
  PK_DEVICE void finish(Shared<T> to, int part) {
    if constexpr (kByRegisters)
#pragma unroll
      for (int i = 0; i < kPartRows; ++i)
        to.set_vector(element(part, i), __byte_perm(values[2 * i], values[2 * i + 1], 0x5410));
  }
};

// ---- the weights: kN filters

template <typename T, typename Tile>
struct WeightLoader {
  static constexpr int kLines = Tile::kThreads / Tile::kDeep;
  static constexpr int kRows = (Tile::kN + kLines - 1) / kLines;
  static_assert(kLines % 8 == 0, "a thread's rows share a swizzle");
  int place;   // of its first row in the tile
  int rows;    // from that one on, that exist
  int offset;  // of that one in the weights

  PK_DEVICE WeightLoader(const ConvolveParams& p, int first_filter, int line, int vector)
      : place(Tile::template place<T>(line, vector)),
        rows(Tile::kN < kLines && line >= Tile::kN ? 0 : p.to_live - first_filter - line),
        offset(rows > 0 ? (first_filter + line) * p.filter_elements : 0) {}

  template <typename Walk>
  PK_DEVICE void start(const ConvolveParams& p, const Walk& walk, Shared<T> to) const {
    const int first = offset + walk.weight + walk.vector * kVector<T>;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (Tile::kN < kLines && place >= Tile::kN * kRowElements<T, Tile>) break;  // more threads than rows
      cp_async<16>(to.address(place + i * kLines * kRowElements<T, Tile>),
                   static_cast<const T*>(p.weight) + (first + i * kLines * p.filter_elements),
                   i * kLines < rows && !walk.done());
    }
  }
};

}  // namespace prunekernels
