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

// Bit i: position at + i * dilation is not one of size. Those inside are a run, so two divisions do for all taps.
PK_DEVICE uint32_t outside_bits(int at, const FastDivide& dilation, int size) {
  const uint32_t first = min(dilation(max(0, -at) + dilation.by - 1), static_cast<uint32_t>(kMaxTaps));
  const uint32_t end = min(dilation(max(0, size - at) + dilation.by - 1), static_cast<uint32_t>(kMaxTaps));
  return ((1u << kMaxTaps) - 1) & ~((1u << end) - (1u << first));
}

// The r-th pixel of the current chunk, for thread r < kChunk. In shared memory, since in registers it would cost every
// thread.
struct alignas(16) PixelWalk {
  int image, row, column, unused;

  PixelWalk() = default;
  PK_DEVICE PixelWalk(const GradWeightParams& p, int first) {
    const int pixel = first + threadIdx.x, per_image = p.out_rows * p.out_columns;
    image = pixel / per_image, row = pixel % per_image / p.out_columns, column = pixel % p.out_columns;
  }
  // In grad_out, and in x as the first tap reads it.
  PK_DEVICE Pixel of_grad_out(const GradWeightParams& p) const {
    if (image >= p.images) return kNoPixel;
    return {(image * p.out_rows + row) * p.out_columns + column, kDeadChannel};
  }
  PK_DEVICE Pixel of_x(const GradWeightParams& p) const {
    if (image >= p.images) return kNoPixel;
    const int y = row * p.stride[0] - p.padding[0], x = column * p.stride[1] - p.padding[1];
    return {(image * p.in_rows + y) * p.in_columns + x, kDeadChannel | outside_bits(y, p.dilation[0], p.in_rows) |
                                                            outside_bits(x, p.dilation[1], p.in_columns) << kMaxTaps};
  }
  PK_DEVICE void advance(const GradWeightParams& p) {
    column += p.chunk_columns, row += p.chunk_rows, image += p.chunk_images;
    if (column >= p.out_columns) column -= p.out_columns, ++row;
    if (row >= p.out_rows) row -= p.out_rows, ++image;
  }
};

template <typename T, typename Tile>
struct GradShared {
  static constexpr int kChannels =
      kColumnPitch<Tile::kM> * kChunk<T>;  // first element of x in a stage, behind grad_out
  static constexpr int kStage = kChannels + kColumnPitch<Tile::kN> * kChunk<T>;
  static constexpr size_t kPixels = kGradStages * kStage * sizeof(T);
  static constexpr size_t kWalks = kPixels + 2 * 2 * kChunk<T> * sizeof(Pixel);  // two buffers, two tensors
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

// The listed channel at `position` in [0, count), or -1.
PK_DEVICE int listed_channel(const int32_t* index, int count, int position) {
  return position < 0 || position >= count ? -1 : index ? index[position] : position;
}

// Loads kColumns channels of a chunk of pixels of one tensor, x at the thread's tap or grad_out.
template <typename T, int kColumns, int kThreads, bool kVectors>
struct ColumnLoader {
  static constexpr int kOwn = kVectors ? 1 : 4 / sizeof(T), kBytes = kVectors ? 16 : 4;
  static constexpr int kUnits = kColumns * sizeof(T) / kBytes;  // of kBytes, along the channels
  static constexpr int kLines = kThreads / kUnits, kRows = kChunk<T> / kLines;
  static constexpr bool kByRegisters = !kVectors && sizeof(T) == 2;
  static_assert(kThreads % kUnits == 0 && kChunk<T> % kLines == 0);
  int channel[kOwn];  // -1: none
  int shift;          // pixels from the first tap to the thread's
  uint32_t bits;      // of that tap, or kMissing: those of a pixel that forbid to read it
  uint32_t values[kByRegisters ? kRows * kOwn : 1];

  PK_DEVICE static int unit() { return threadIdx.x % kUnits; }
  PK_DEVICE static int vector() { return unit() * kBytes / 16; }
  PK_DEVICE static int within() { return unit() * kBytes % 16 / static_cast<int>(sizeof(T)); }
  PK_DEVICE static int row() { return threadIdx.x / kUnits; }

  // first: compact channel of this thread, < 0: none
  PK_DEVICE ColumnLoader(const int32_t* index, int count, int first, int shift, uint32_t bits)
      : shift(shift), bits(bits) {
#pragma unroll
    for (int e = 0; e < kOwn; ++e) channel[e] = first < 0 ? -1 : listed_channel(index, count, first + e);
  }
  PK_DEVICE static int place(int i) {
    return (row() + i * kLines) * kColumnPitch<kColumns> + vector() * kVector<T> + within();
  }

  PK_DEVICE void start(const void* tensor, int pixel_bytes, Shared<T> to, Shared<Pixel> pixels) {
    const int channels[2] = {kept(channel[0]), kept(channel[kOwn - 1])};  // what follows is not worth a register
    const T* first = static_cast<const T*>(tensor) + (kVectors ? max(channels[0], 0) : channels[0]);  // aligned
    const char* from = kept(reinterpret_cast<const char*>(kept(first)) + static_cast<int64_t>(shift) * pixel_bytes);
    const int64_t second = channels[1] - channels[0];
    const uint32_t forbidding = channels[0] < 0 ? kDeadChannel : bits,
                   forbidding_second = channels[1] < 0 ? kDeadChannel : bits;
    const Shared<Pixel> mine = pixels + row();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Pixel pixel = mine.get(i * kLines);
      const char* at = from + static_cast<int64_t>(pixel.index) * pixel_bytes;
      const bool valid = (pixel.outside & forbidding) == 0;
      if constexpr (kByRegisters) {
        values[2 * i] = load_two_bytes(at, valid);
        values[2 * i + 1] =
            load_two_bytes(at + second * static_cast<int64_t>(sizeof(T)), (pixel.outside & forbidding_second) == 0);
      } else {
        cp_async<kBytes>(to.address(place(i)), at, valid);
      }
    }
  }
  PK_DEVICE void finish(Shared<T> to) {
    if constexpr (kByRegisters)
#pragma unroll
      for (int i = 0; i < kRows; ++i) to.set_vector(place(i), __byte_perm(values[2 * i], values[2 * i + 1], 0x5410));
  }
};

template <typename T, typename Multiply, int kM, int kN>
PK_DEVICE void store_partial(const GradWeightParams& p, const Sums<kM, kN>& sums, int first_filter, int first_column,
                             Shared<int32_t> offsets) {
  const int64_t row_floats = static_cast<int64_t>(p.kernel_taps) * p.packed_channels;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int column = first_column + sums.column(j), offset = offsets.get(column / kVector<T>);
    if (offset < 0) continue;
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      const int filter = first_filter + Multiply::row(i / 2, i % 2);
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
  using FilterLoader = ColumnLoader<T, Tile::kM, Tile::kThreads, kFilterVectors>;
  using ChannelLoader = ColumnLoader<T, Tile::kN, Tile::kThreads, kChannelVectors>;
  constexpr int kTileVectors = Tile::kN / kVector<T>;
  const int filter_tile = blockIdx.y, first_filter = filter_tile * Tile::kM, first_vector = blockIdx.x * kTileVectors;
  if (kListed && tap_vector<T, kListed>(p, filter_tile, first_vector).vector < 0) return;  // of a shorter list

  const Shared<T> stages(0);
  const Shared<Pixel> pixels(Layout::kPixels);  // [buffer][grad_out, x][kChunk]
  const Shared<PixelWalk> walks(Layout::kWalks);
  const Shared<int32_t> offsets(Layout::kOffsets);
  if (threadIdx.x < kTileVectors)
    offsets.set(threadIdx.x, tap_vector<T, kListed>(p, filter_tile, first_vector + threadIdx.x).offset(p, kVector<T>));

  FilterLoader filters(p.filter_index, p.filters,
                       first_filter + FilterLoader::vector() * kVector<T> + FilterLoader::within(), 0, kMissing);
  const TapVector mine = tap_vector<T, kListed>(p, filter_tile, first_vector + ChannelLoader::vector());
  const int tap_row = mine.tap / p.kernel_columns, tap_column = mine.tap % p.kernel_columns;
  const int down = static_cast<int>(p.dilation[0].by) * p.in_columns, right = static_cast<int>(p.dilation[1].by);
  ChannelLoader channels(p.channel_index, p.channels,
                         mine.vector < 0 ? -1 : mine.vector * kVector<T> + ChannelLoader::within(),
                         tap_row * down + tap_column * right, row_bit(tap_row) | column_bit(tap_column));

  const int first_chunk = static_cast<int>(static_cast<int64_t>(p.chunks) * blockIdx.z / gridDim.z);
  const int steps = static_cast<int>(static_cast<int64_t>(p.chunks) * (blockIdx.z + 1) / gridDim.z) - first_chunk;
  if (threadIdx.x < kChunk<T>) walks.set(threadIdx.x, PixelWalk(p, first_chunk * kChunk<T>));
  // Notes the pixels of the next chunk to load, in one of two buffers in turn.
  const auto note_pixels = [&](int step) {
    if (threadIdx.x >= kChunk<T>) return;
    PixelWalk walk = walks.get(threadIdx.x);
    const Shared<Pixel> to = pixels + (step % 2 * 2 * kChunk<T> + threadIdx.x);
    to.set(0, walk.of_grad_out(p)), to.set(kChunk<T>, walk.of_x(p));
    walk.advance(p);
    walks.set(threadIdx.x, walk);
  };

  note_pixels(0);

  const int warp_row = warp_id() / Tile::kWarpsN * Tile::kWarpM, warp_column = warp_id() % Tile::kWarpsN * Tile::kWarpN;
  const typename Multiply::Lanes lanes(warp_row, warp_column);
  Sums<Tile::kWarpM, Tile::kWarpN> sums{};
  for (int step = 1 - kGradStages; step < steps; ++step) {  // multiplies from 0 on, loads kGradStages - 1 ahead
    cp_async_wait<kGradStages - 2>();
    __syncthreads();  // this step's chunk has arrived, and all threads have read the previous one
    const int next = step + kGradStages - 1;
    const bool loads = next < steps;
    const Shared<T> stage = stages + (step & (kGradStages - 1)) * Layout::kStage,
                    to = stages + (next & (kGradStages - 1)) * Layout::kStage;
    const Shared<Pixel> from = pixels + next % 2 * 2 * kChunk<T>;
    if (loads) filters.start(p.grad_out, p.out_bytes, to, from);
    if (step >= 0) Multiply::slice(sums, stage, lanes, 0);
    if (loads) {
      filters.finish(to);
      channels.start(p.x, p.in_bytes, to + Layout::kChannels, from + kChunk<T>);
    }
    if (step >= 0) Multiply::slice(sums, stage, lanes, 1);
    if (loads) channels.finish(to + Layout::kChannels);
    note_pixels(next + 1);
    cp_async_commit();
  }
  store_partial<T, Multiply>(p, sums, first_filter + warp_row, warp_column, offsets);
}

}  // namespace prunekernels
