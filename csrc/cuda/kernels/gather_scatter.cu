// Channel gather and scatter: result[n, o] = map[o] >= 0 ? source[n, map[o]] : 0. They differ in whether the result or
// the source is the narrow one, and so in the units that copy fastest.
#include "cuda/kernels/channel_copy.cuh"
#include "cuda/kernels/channel_copy.h"

namespace prunekernels {
namespace {

using Bytes2 = uint16_t;
using Bytes4 = uint32_t;
using Bytes8 = uint64_t;
using Bytes16 = Pack<uint64_t, 2>;

// NCHW. Vector: the widest type that divides planes of this size. Neighbouring lanes read and write neighbours of a
// plane.
template <typename Vector>
PK_DEVICE void copy_planes(const Vector* __restrict__ source, const int32_t* __restrict__ map,
                           Vector* __restrict__ result, uint32_t source_channels, const PlaneSplit& split) {
  const uint32_t first = split.first();
  Vector moved[kCopyInFlight];
#pragma unroll
  for (int i = 0; i < kCopyInFlight; ++i) {
    const uint32_t vector = first + i * kCopyThreads;
    moved[i] = Vector{};
    if (vector >= split.vectors) continue;
    const PlaneSplit::Place at = split.place(vector);
    const int32_t slot = map[at.channel];
    if (slot >= 0) moved[i] = source[split.source(at, slot, source_channels)];
  }
#pragma unroll
  for (int i = 0; i < kCopyInFlight; ++i)
    if (first + i * kCopyThreads < split.vectors) result[first + i * kCopyThreads] = moved[i];
}

// Copies kCount pixels; all are loaded before the first is stored. from, to: channel 0 of the source and the unit of
// the result at the first of them, moved on to the next one.
template <int kCount, typename T, int kPerUnit>
PK_DEVICE void copy_some(const T*& from, Pack<T, kPerUnit>*& to, const int32_t (&slot)[kPerUnit], int64_t from_step,
                         int64_t to_step) {
  Pack<T, kPerUnit> moved[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i, from += from_step)
#pragma unroll
    for (int j = 0; j < kPerUnit; ++j) moved[i].at[j] = slot[j] < 0 ? T{} : from[slot[j]];
#pragma unroll
  for (int i = 0; i < kCount; ++i, to += to_step) *to = moved[i];
}

// NHWC. A "channel" of type T is a granule: 2^granule_shift real channels that are copied together.
template <typename T, int kPerUnit>
PK_DEVICE void copy_pixels(const T* __restrict__ source, const int32_t* __restrict__ map, T* __restrict__ result,
                           int64_t source_channels, int granule_shift, const PixelSplit& split) {
  const int32_t unit = split.unit();
  if (unit < 0) return;
  int32_t slot[kPerUnit];
#pragma unroll
  for (int j = 0; j < kPerUnit; ++j) slot[j] = map[(unit * kPerUnit + j) << granule_shift] >> granule_shift;
  const int64_t first = split.first();
  const T* from = source + first * source_channels;
  auto* to = reinterpret_cast<Pack<T, kPerUnit>*>(result) + (first * split.units + unit);
  const int64_t from_step = split.rows * source_channels, to_step = static_cast<int64_t>(split.rows) * split.units;
  int32_t left = split.count(first);
#pragma unroll 1
  for (; left >= kCopyInFlight; left -= kCopyInFlight) copy_some<kCopyInFlight>(from, to, slot, from_step, to_step);
#pragma unroll 1
  for (; left > 0; --left) copy_some<1>(from, to, slot, from_step, to_step);
}

template <typename Vector>
__global__ void __launch_bounds__(kCopyThreads)
    gather_channels_planes_kernel(const Vector* full, const int32_t* index, Vector* compact, uint32_t source_channels,
                                  PlaneSplit split) {
  copy_planes(full, index, compact, source_channels, split);
}
template <typename Vector>
__global__ void __launch_bounds__(kCopyThreads)
    scatter_channels_planes_kernel(const Vector* compact, const int32_t* slot, Vector* full, uint32_t source_channels,
                                   PlaneSplit split) {
  copy_planes(compact, slot, full, source_channels, split);
}
template <typename T, int kPerUnit>
__global__ void __launch_bounds__(kCopyThreads)
    gather_channels_pixels_kernel(const T* full, const int32_t* index, T* compact, int64_t source_channels,
                                  int granule_shift, PixelSplit split) {
  copy_pixels<T, kPerUnit>(full, index, compact, source_channels, granule_shift, split);
}
template <typename T, int kPerUnit>
__global__ void __launch_bounds__(kCopyThreads)
    scatter_channels_pixels_kernel(const T* compact, const int32_t* slot, T* full, int64_t source_channels,
                                   int granule_shift, PixelSplit split) {
  copy_pixels<T, kPerUnit>(compact, slot, full, source_channels, granule_shift, split);
}

template <bool kGather>
struct Copy {
  const void* source;
  const int32_t* map;
  void* result;
  int64_t source_channels, result_channels;
  const ChannelCopy& sizes;
  cudaStream_t stream;

  template <typename Vector>
  cudaError_t planes() const {
    const int64_t plane_vectors = sizes.pixels * sizes.element_bytes / static_cast<int64_t>(sizeof(Vector));
    constexpr auto kernel = kGather ? gather_channels_planes_kernel<Vector> : scatter_channels_planes_kernel<Vector>;
    return each_plane_split(sizes.images, result_channels, plane_vectors, [&](const PlaneSplit& split, int64_t image) {
      return launch(kernel, plane_launch(split), stream,
                    static_cast<const Vector*>(source) + image * source_channels * plane_vectors, map,
                    static_cast<Vector*>(result) + image * result_channels * plane_vectors,
                    static_cast<uint32_t>(source_channels), split);
    });
  }
  cudaError_t planes() const {
    const auto made_of = [&](int64_t bytes) {
      return sizes.pixels * sizes.element_bytes % bytes == 0 && aligned(source, bytes) && aligned(result, bytes);
    };
    if (made_of(16)) return planes<Bytes16>();
    if (made_of(8)) return planes<Bytes8>();
    if (made_of(4)) return planes<Bytes4>();
    return planes<Bytes2>();
  }

  template <typename T, int kPerUnit>
  cudaError_t pixels(int granule_shift) const {
    const PixelSplit split(sizes.images * sizes.pixels, (result_channels >> granule_shift) / kPerUnit);
    if (split.too_large()) return cudaErrorInvalidValue;
    const auto go = [&](auto kernel) {
      return launch(kernel, split.launch_shape(), stream, static_cast<const T*>(source), map, static_cast<T*>(result),
                    source_channels >> granule_shift, granule_shift, split);
    };
    if constexpr (kGather)
      return go(gather_channels_pixels_kernel<T, kPerUnit>);
    else
      return go(scatter_channels_pixels_kernel<T, kPerUnit>);
  }
  // How many channels make a unit. A scatter reads channels that lie side by side: 16 bytes of them. A gather reads
  // channels that lie apart: the fewer each lane takes, the more cache lines neighbouring lanes share.
  template <typename T, int kMost>
  cudaError_t units(int shift) const {
    const auto made_of = [&](int64_t count) {
      const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
      return (result_channels >> shift) % count == 0 && aligned(result, bytes);
    };
    if constexpr (!kGather)
      if (made_of(kMost)) return pixels<T, kMost>(shift);
    if constexpr (sizeof(T) == 2)
      if (made_of(2)) return pixels<T, 2>(shift);
    return pixels<T, 1>(shift);
  }
  cudaError_t pixels() const {
    int64_t bytes = sizes.element_bytes, granule = sizes.granule;
    int shift = 0;
    for (; granule % 2 == 0 && bytes < 16 && aligned(source, 2 * bytes) && aligned(result, 2 * bytes); granule /= 2)
      bytes *= 2, ++shift;
    if (bytes == 16) return pixels<Bytes16, 1>(shift);
    if (bytes == 8) return units<Bytes8, 2>(shift);
    if (bytes == 4) return units<Bytes4, 4>(shift);
    return units<Bytes2, 8>(shift);
  }

  cudaError_t run() const {
    if (sizes.images * sizes.pixels * result_channels == 0) return cudaSuccess;
    if (sizes.element_bytes != 2 && sizes.element_bytes != 4 && sizes.element_bytes != 8) return cudaErrorInvalidValue;
    return sizes.channels_last ? pixels() : planes();
  }
};

}  // namespace

cudaError_t launch_gather_channels(const void* full, const int32_t* index, void* compact, const ChannelCopy& copy,
                                   cudaStream_t stream) {
  return Copy<true>{full, index, compact, copy.full, copy.compact, copy, stream}.run();
}

cudaError_t launch_scatter_channels(const void* compact, const int32_t* slot, void* full, const ChannelCopy& copy,
                                    cudaStream_t stream) {
  return Copy<false>{compact, slot, full, copy.compact, copy.full, copy, stream}.run();
}

}  // namespace prunekernels
