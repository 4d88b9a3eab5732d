// How gather, scatter and join divide their result among blocks, threads and vectors, for planes (NCHW) and for pixels
// (NHWC). result[n, o] comes from channel map[o] of a source; it is 0 where map[o] < 0.
#pragma once

#include <algorithm>

#include "cuda/kernels/fast_divide.cuh"
#include "cuda/kernels/ptx.cuh"

namespace prunekernels {

constexpr int kCopyThreads = 256;
constexpr int kCopyInFlight = 4;       // vectors that a thread loads before it stores the first
constexpr int64_t kCopyBlocks = 1024;  // about as many as a large device holds; beyond, blocks do more rounds
constexpr int64_t kCopyRounds = 8;     // at most

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// NCHW: the result is one row of vectors, plane after plane. Each thread has kCopyInFlight of them, kCopyThreads apart.
struct PlaneSplit {
  FastDivide plane, channels;  // vectors of a plane, planes of an image of the result
  uint32_t vectors;            // in all
  struct Place {
    uint32_t image, channel, offset;
  };
  PK_DEVICE Place place(uint32_t vector) const {
    const uint32_t p = plane(vector), image = channels(p);
    return {image, p - image * channels.by, vector - p * plane.by};
  }
  PK_DEVICE uint32_t first() const { return blockIdx.x * (kCopyThreads * kCopyInFlight) + threadIdx.x; }
  PK_DEVICE int64_t source(const Place& at, int32_t slot, uint32_t source_channels) const {
    return (static_cast<int64_t>(at.image) * source_channels + slot) * plane.by + at.offset;
  }
};

// Calls visit(split, first image) for each stretch of images that is short enough for 32-bit indices.
template <typename Visit>
cudaError_t each_plane_split(int64_t images, int64_t channels, int64_t plane_vectors, Visit visit) {
  constexpr int64_t kMost = (int64_t{1} << 31) - kCopyThreads * kCopyInFlight;
  const int64_t image_vectors = channels * plane_vectors;
  if (image_vectors > kMost) return cudaErrorInvalidValue;
  const int64_t stretch = std::min(images, kMost / image_vectors);
  for (int64_t n = 0; n < images; n += stretch) {
    const PlaneSplit split{FastDivide(static_cast<uint32_t>(plane_vectors)),
                           FastDivide(static_cast<uint32_t>(channels)),
                           static_cast<uint32_t>(std::min(stretch, images - n) * image_vectors)};
    const cudaError_t status = visit(split, n);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
inline LaunchShape plane_launch(const PlaneSplit& split) {
  constexpr uint32_t kPerBlock = kCopyThreads * kCopyInFlight;
  return {dim3((split.vectors + kPerBlock - 1) / kPerBlock), dim3(kCopyThreads), 0};
}

// NHWC: a thread keeps to one unit (a few neighbouring channels of the result) and walks down the pixels, so that it
// looks up its channels once. A block covers `rows` pixels x `block_units` units; left-over threads idle.
struct PixelSplit {
  int64_t pixels;  // in all
  int32_t units;   // of a pixel of the result
  int32_t block_units, rows, rounds;

  PixelSplit(int64_t pixel_count, int64_t unit_count) : pixels(pixel_count), units(static_cast<int32_t>(unit_count)) {
    const int64_t across = (unit_count + kCopyThreads - 1) / kCopyThreads;
    block_units = static_cast<int32_t>((unit_count + across - 1) / across);
    rows = kCopyThreads / block_units;
    const int64_t steps = (pixels + rows * kCopyInFlight - 1) / (rows * kCopyInFlight);
    rounds = static_cast<int32_t>(std::clamp<int64_t>(steps * across / kCopyBlocks, 1, kCopyRounds));
  }
  LaunchShape launch_shape() const {
    const int64_t pixels_per_block = int64_t{rows} * kCopyInFlight * rounds;
    return {dim3(static_cast<uint32_t>((pixels + pixels_per_block - 1) / pixels_per_block),
                 static_cast<uint32_t>((units + block_units - 1) / block_units)),
            dim3(kCopyThreads), 0};
  }
  bool too_large() const { return launch_shape().grid.y > 65535; }

  // The unit of this thread; -1 if it idles.
  PK_DEVICE int32_t unit() const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int32_t unit = static_cast<int32_t>(blockIdx.y) * block_units + thread % block_units;
    return thread < rows * block_units && unit < units ? unit : -1;
  }
  PK_DEVICE int64_t first() const {
    return static_cast<int64_t>(blockIdx.x) * rounds * rows * kCopyInFlight + threadIdx.x / block_units;
  }
  // How many pixels this thread has, `rows` apart, from its first one on.
  PK_DEVICE int32_t count(int64_t first) const {
    const int32_t most = rounds * kCopyInFlight;
    const int64_t left = pixels - first;
    return left > int64_t{most} * rows ? most : (static_cast<int32_t>(left) + rows - 1) / rows;
  }
};

// Whether p is a multiple of so many bytes.
inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace prunekernels
