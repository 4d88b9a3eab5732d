// The kernel of igemm_grad_weight and block_sparse_grad_weight:
//
//   partial[split, i, tap, j] = sum over the split's pixels of
//                               grad_out[pixel, filter_index[i]] x[pixel at tap, channel_index[j]]
//
// A block owns kM filters x kN columns x a range of pixels. Columns are the vectors of listed channels at all taps, one
// tap after the other, so that few channels still fill a tile. The reduction goes over pixels, kChunk in a step. Both
// operands lie in shared memory as in global memory, [pixel][channel], and are transposed on the way into the
// fragments. A thread loads one vector (or word) for several pixels, always of the same channels and tap. Tails: pixels
// and vectors beyond the last are zeros; filters beyond the last are not stored.
#pragma once

#include "cuda/kernels/igemm_load.cuh"

namespace prunekernels {

constexpr int kGradStages = 4;  // a power of two

struct alignas(16) GradPixel {
  int32_t out;     // of grad_out, -1: none
  int32_t in;      // of x, as the first tap with offset 0 reads it
  int32_t corner;  // row << 16 | column there; kNowhere: none
  int32_t unused;
};

// The r-th pixel of the current chunk, for thread r < kChunk. In shared memory, since in registers it would cost every
// thread.
struct alignas(16) PixelWalk {
  int image, row, column, unused;

  PixelWalk() = default;
  PK_DEVICE PixelWalk(const GradWeightParams& p, int first) {
    const int pixel = first + threadIdx.x, per_image = p.out_rows * p.out_columns;
    image = pixel / per_image, row = pixel % per_image / p.out_columns, column = pixel % p.out_columns;
  }
  PK_DEVICE GradPixel here(const GradWeightParams& p) const {
    if (image >= p.images) return {-1, 0, kNowhere, 0};
    const int y = row * p.stride[0], x = column * p.stride[1];
    return {(image * p.out_rows + row) * p.out_columns + column, (image * p.in_rows + y) * p.in_columns + x,
            y << 16 | x, 0};
  }
  PK_DEVICE void advance(const GradWeightParams& p) {
    column += p.chunk_columns, row += p.chunk_rows, image += p.chunk_images;
    if (column >= p.out_columns) column -= p.out_columns, ++row;
    if (row >= p.out_rows) row -= p.out_rows, ++image;
  }
};

template <typename T, typename Tile>
struct GradShared {
  static constexpr int kChannels = kColumnPitch<Tile::kM> * kChunk<T>;  // first element of x in a stage
  static constexpr int kStage = kChannels + kColumnPitch<Tile::kN> * kChunk<T>;
  static constexpr size_t kPixels = kGradStages * kStage * sizeof(T);
  static constexpr size_t kWalks = kPixels + 2 * kChunk<T> * sizeof(GradPixel);
  static constexpr size_t kOffsets = kWalks + kChunk<T> * sizeof(PixelWalk);
  static constexpr size_t kBytes = kOffsets + Tile::kN / kVector<T> * sizeof(int32_t);
  static_assert(kBytes <= kMaxSharedBytes);
};

// The packed vector and the tap of a column of vectors; vector -1: none. offset(): in [taps, packed_channels].
struct TapVector {
  int vector, tap;
  PK_DEVICE int offset(const GradWeightParams& p, int vector_channels) const {
    return vector < 0 ? -1 : tap * p.packed_channels + vector * vector_channels;
  }
};

template <typename T, bool kListed>
PK_DEVICE TapVector tap_vector(const GradWeightParams& p, int filter_tile, int column_vector) {
  const int32_t* list = kListed ? p.list_vectors + p.list_first[filter_tile] : nullptr;
  const int vectors =
      kListed ? p.list_first[filter_tile + 1] - p.list_first[filter_tile] : (p.channels + kVector<T> - 1) / kVector<T>;
  if (vectors == 0 || column_vector / vectors >= p.kernel_taps) return {-1, 0};
  const int place = column_vector % vectors;
  return {kListed ? list[place] : place, column_vector / vectors};
}

// Loads kColumns channels of a chunk of pixels. kX: of x, at this thread's tap; else of grad_out.
template <typename T, int kColumns, int kThreads, bool kVectors, bool kX>
struct ColumnLoader {
  static constexpr int kOwn = kVectors ? 1 : 4 / sizeof(T), kBytes = kVectors ? 16 : 4;
  static constexpr int kUnits = kColumns * sizeof(T) / kBytes;  // of kBytes, along the channels
  static constexpr int kLines = kThreads / kUnits, kRows = kChunk<T> / kLines;
  static constexpr bool kByRegisters = !kVectors && sizeof(T) == 2;
  static_assert(kThreads % kUnits == 0 && kChunk<T> % kLines == 0);
  int channel[kOwn];
  int at_row, at_column;
  T values[kByRegisters ? kRows * kOwn : 1];

  PK_DEVICE static int unit() { return threadIdx.x % kUnits; }
  PK_DEVICE static int vector() { return unit() * kBytes / 16; }
  PK_DEVICE static int within() { return unit() * kBytes % 16 / static_cast<int>(sizeof(T)); }
  PK_DEVICE static int row(int i) { return threadIdx.x / kUnits + i * kLines; }
  PK_DEVICE static int element(int i) { return row(i) * kColumnPitch<kColumns> + vector() * kVector<T> + within(); }

  // first: compact channel of this thread, < 0: none
  PK_DEVICE ColumnLoader(const int32_t* index, int count, int first, int at_row, int at_column)
      : at_row(at_row), at_column(at_column) {
#pragma unroll
    for (int e = 0; e < kOwn; ++e)
      channel[e] = first < 0 || first + e >= count ? -1 : index ? index[first + e] : first + e;
  }

  PK_DEVICE void start(const GradWeightParams& p, Shared<T> to, Shared<GradPixel> pixels) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const GradPixel pixel = pixels.get(row(i));
      bool valid = pixel.out >= 0;
      int64_t from;
      if constexpr (kX) {
        valid =
            static_cast<uint32_t>((pixel.corner >> 16) + at_row) < static_cast<uint32_t>(p.in_rows) &&
            static_cast<uint32_t>(static_cast<int16_t>(pixel.corner) + at_column) < static_cast<uint32_t>(p.in_columns);
        from = static_cast<int64_t>(pixel.in + at_row * p.in_columns + at_column) * p.channel_stride;
      } else {
        from = static_cast<int64_t>(pixel.out) * p.filter_stride;
      }
      const T* data = static_cast<const T*>(kX ? p.x : p.grad_out) + from;
      if constexpr (kByRegisters) {
#pragma unroll
        for (int e = 0; e < kOwn; ++e) values[i * kOwn + e] = valid && channel[e] >= 0 ? data[channel[e]] : T{0};
      } else {
        cp_async<kBytes>(to.address(element(i)), data + max(channel[0], 0), valid && channel[0] >= 0);
      }
    }
  }
  PK_DEVICE void finish(Shared<T> to) {
    if constexpr (kByRegisters)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        to.set_vector(element(i),
                      static_cast<uint32_t>(values[2 * i].bits) | static_cast<uint32_t>(values[2 * i + 1].bits) << 16);
  }
};

template <typename T, int kM, int kN>
PK_DEVICE void store_partial(const GradWeightParams& p, const Sums<kM, kN>& sums, int first_filter, int first_column,
                             Shared<int32_t> offsets) {
  const int64_t row_floats = static_cast<int64_t>(p.kernel_taps) * p.packed_channels;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int column = first_column + sums.column(j), offset = offsets.get(column / kVector<T>);
    if (offset < 0) continue;
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      const int filter = first_filter + sums.row(i / 2, i % 2);
      if (filter >= p.filters) continue;
      const float* pair = sums.at[i / 2][j] + i % 2 * 2;
      float* to = p.partial + (static_cast<int64_t>(blockIdx.z) * p.filters + filter) * row_floats + offset;
      *reinterpret_cast<float2*>(to + column % kVector<T>) = make_float2(pair[0], pair[1]);
    }
  }
}

template <typename Math, typename Tile, bool kFilterVectors, bool kChannelVectors, bool kListed>
PK_DEVICE void grad_weight(const GradWeightParams& p) {
  using T = Storage<Math>;
  using Layout = GradShared<T, Tile>;
  using Multiply = MultiplyColumns<Math, Tile::kWarpM, Tile::kWarpN, Tile::kM, Tile::kN>;
  using FilterLoader = ColumnLoader<T, Tile::kM, Tile::kThreads, kFilterVectors, false>;
  using ChannelLoader = ColumnLoader<T, Tile::kN, Tile::kThreads, kChannelVectors, true>;
  constexpr int kTileVectors = Tile::kN / kVector<T>;
  const int filter_tile = blockIdx.y, first_filter = filter_tile * Tile::kM, first_vector = blockIdx.x * kTileVectors;
  if (kListed && tap_vector<T, kListed>(p, filter_tile, first_vector).vector < 0) return;  // of a shorter list

  const Shared<T> stages(0);
  const Shared<GradPixel> pixels(Layout::kPixels);
  const Shared<PixelWalk> walks(Layout::kWalks);
  const Shared<int32_t> offsets(Layout::kOffsets);
  if (threadIdx.x < kTileVectors)
    offsets.set(threadIdx.x, tap_vector<T, kListed>(p, filter_tile, first_vector + threadIdx.x).offset(p, kVector<T>));

  FilterLoader filters(p.filter_index, p.filters,
                       first_filter + FilterLoader::vector() * kVector<T> + FilterLoader::within(), 0, 0);
  const TapVector mine = tap_vector<T, kListed>(p, filter_tile, first_vector + ChannelLoader::vector());
  ChannelLoader channels(p.channel_index, p.channels,
                         mine.vector < 0 ? -1 : mine.vector * kVector<T> + ChannelLoader::within(),
                         mine.tap / p.kernel_columns * p.dilation[0] - p.padding[0],
                         mine.tap % p.kernel_columns * p.dilation[1] - p.padding[1]);

  const int first_chunk = static_cast<int>(static_cast<int64_t>(p.chunks) * blockIdx.z / gridDim.z);
  const int steps = static_cast<int>(static_cast<int64_t>(p.chunks) * (blockIdx.z + 1) / gridDim.z) - first_chunk;
  if (threadIdx.x < kChunk<T>) walks.set(threadIdx.x, PixelWalk(p, first_chunk * kChunk<T>));
  // Notes the pixels of the next chunk to load, in one of two buffers in turn.
  const auto note_pixels = [&](int step) {
    if (threadIdx.x >= kChunk<T>) return;
    PixelWalk walk = walks.get(threadIdx.x);
    pixels.set(step % 2 * kChunk<T> + threadIdx.x, walk.here(p));
    walk.advance(p);
    walks.set(threadIdx.x, walk);
  };

  note_pixels(0);

  const int warp_row = warp_id() / Tile::kWarpsN * Tile::kWarpM, warp_column = warp_id() % Tile::kWarpsN * Tile::kWarpN;
  Sums<Tile::kWarpM, Tile::kWarpN> sums{};
  for (int step = 1 - kGradStages; step < steps; ++step) {  // multiplies from 0 on, loads kGradStages - 1 ahead
    cp_async_wait<kGradStages - 2>();
    __syncthreads();  // this step's chunk has arrived, and all threads have read the previous one
    const int next = step + kGradStages - 1;
    const bool loads = next < steps;
    const Shared<T> a = stages + (step & (kGradStages - 1)) * Layout::kStage, b = a + Layout::kChannels;
    const Shared<T> to = stages + (next & (kGradStages - 1)) * Layout::kStage;
    const Shared<GradPixel> from = pixels + next % 2 * kChunk<T>;
    if (loads) filters.start(p, to, from);
    if (step >= 0) Multiply::slice(sums, a, warp_row, b, warp_column, 0);
    if (loads) {
      filters.finish(to);
      channels.start(p, to + Layout::kChannels, from);
    }
    if (step >= 0) Multiply::slice(sums, a, warp_row, b, warp_column, 1);
    if (loads) channels.finish(to + Layout::kChannels);
    note_pixels(next + 1);
    cp_async_commit();
  }
  store_partial<T>(p, sums, first_filter + warp_row, warp_column, offsets);
}

}  // namespace prunekernels
