// out[n, o] = a[n, slot_a[o]] + alpha * b[n, slot_b[o]], a term whose slot is < 0 left out: the sum of two
// channel-compact tensors with different live lists, in one pass. Blocks and threads as in channel_copy.cuh.
#include "cuda/kernels/channel_copy.cuh"
#include "cuda/kernels/channel_copy.h"

namespace prunekernels {
namespace {

template <typename T, int kCount>
PK_DEVICE Pack<T, kCount> sum(const Pack<T, kCount>& a, const Pack<T, kCount>& b, float alpha) {
  Pack<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.at[i] = from_float<T>(to_float(a.at[i]) + alpha * to_float(b.at[i]));
  return out;
}

// NCHW, in vectors of kCount elements of a plane.
template <typename T, int kCount>
__global__ void __launch_bounds__(kCopyThreads)
    join_planes_kernel(const Pack<T, kCount>* __restrict__ a, const int32_t* __restrict__ slot_a,
                       const Pack<T, kCount>* __restrict__ b, const int32_t* __restrict__ slot_b,
                       Pack<T, kCount>* __restrict__ out, uint32_t a_channels, uint32_t b_channels, float alpha,
                       PlaneSplit split) {
  const uint32_t first = split.first();
  Pack<T, kCount> from_a[kCopyInFlight], from_b[kCopyInFlight];
#pragma unroll
  for (int i = 0; i < kCopyInFlight; ++i) {
    const uint32_t vector = first + i * kCopyThreads;
    from_a[i] = {}, from_b[i] = {};
    if (vector >= split.vectors) continue;
    const PlaneSplit::Place at = split.place(vector);
    const int32_t in_a = slot_a[at.channel], in_b = slot_b[at.channel];
    if (in_a >= 0) from_a[i] = a[split.source(at, in_a, a_channels)];
    if (in_b >= 0) from_b[i] = b[split.source(at, in_b, b_channels)];
  }
#pragma unroll
  for (int i = 0; i < kCopyInFlight; ++i)
    if (first + i * kCopyThreads < split.vectors) out[first + i * kCopyThreads] = sum(from_a[i], from_b[i], alpha);
}

// A term of a join at one pixel after the other: channel 0 there, and the thread's channels (< 0: left out).
template <typename T, int kCount>
struct Term {
  const T* at;
  int64_t step;
  int32_t slot[kCount];

  PK_DEVICE Term(const T* term, const int32_t* slots, int64_t channels, int32_t unit, int64_t first, int32_t rows)
      : at(term + first * channels), step(rows * channels) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) slot[j] = slots[unit * kCount + j];
  }
  PK_DEVICE Pack<T, kCount> next() {
    Pack<T, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.at[j] = slot[j] < 0 ? T{} : at[slot[j]];
    at += step;
    return pack;
  }
};

// Joins kPixels pixels; all are loaded before the first is stored.
template <int kPixels, typename T, int kCount>
PK_DEVICE void join_some(Term<T, kCount>& a, Term<T, kCount>& b, Pack<T, kCount>*& out, int64_t out_step, float alpha) {
  Pack<T, kCount> from_a[kPixels], from_b[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) from_a[i] = a.next(), from_b[i] = b.next();
#pragma unroll
  for (int i = 0; i < kPixels; ++i, out += out_step) *out = sum(from_a[i], from_b[i], alpha);
}

// NHWC, in units of kCount channels (4 bytes), so that neighbouring lanes share cache lines of a and of b.
template <typename T, int kCount>
__global__ void __launch_bounds__(kCopyThreads)
    join_pixels_kernel(const T* __restrict__ a, const int32_t* __restrict__ slot_a, const T* __restrict__ b,
                       const int32_t* __restrict__ slot_b, Pack<T, kCount>* __restrict__ out, int64_t a_channels,
                       int64_t b_channels, float alpha, PixelSplit split) {
  const int32_t unit = split.unit();
  if (unit < 0) return;
  const int64_t first = split.first(), out_step = static_cast<int64_t>(split.rows) * split.units;
  Term<T, kCount> term_a(a, slot_a, a_channels, unit, first, split.rows),
      term_b(b, slot_b, b_channels, unit, first, split.rows);
  Pack<T, kCount>* to = out + (first * split.units + unit);
  int32_t left = split.count(first);
#pragma unroll 1
  for (; left >= kCopyInFlight; left -= kCopyInFlight) join_some<kCopyInFlight>(term_a, term_b, to, out_step, alpha);
#pragma unroll 1
  for (; left > 0; --left) join_some<1>(term_a, term_b, to, out_step, alpha);
}

template <typename T>
struct Join {
  const T* a;
  const int32_t* slot_a;
  const T* b;
  const int32_t* slot_b;
  T* out;
  const ChannelJoin& sizes;
  cudaStream_t stream;

  template <int kCount>
  cudaError_t planes() const {
    using Vector = Pack<T, kCount>;
    const int64_t plane_vectors = sizes.pixels / kCount;
    return each_plane_split(sizes.images, sizes.out, plane_vectors, [&](const PlaneSplit& split, int64_t image) {
      return launch(join_planes_kernel<T, kCount>, plane_launch(split), stream,
                    reinterpret_cast<const Vector*>(a) + image * sizes.a * plane_vectors, slot_a,
                    reinterpret_cast<const Vector*>(b) + image * sizes.b * plane_vectors, slot_b,
                    reinterpret_cast<Vector*>(out) + image * sizes.out * plane_vectors, static_cast<uint32_t>(sizes.a),
                    static_cast<uint32_t>(sizes.b), sizes.alpha, split);
    });
  }
  template <int kCount>
  cudaError_t pixels() const {
    const PixelSplit split(sizes.images * sizes.pixels, sizes.out / kCount);
    if (split.too_large()) return cudaErrorInvalidValue;
    return launch(join_pixels_kernel<T, kCount>, split.launch_shape(), stream, a, slot_a, b, slot_b,
                  reinterpret_cast<Pack<T, kCount>*>(out), sizes.a, sizes.b, sizes.alpha, split);
  }
  cudaError_t run() const {
    if (sizes.images * sizes.pixels * sizes.out == 0) return cudaSuccess;
    constexpr int kVector = 16 / sizeof(T), kUnit = 4 / sizeof(T);
    const auto all_aligned = [&](int64_t bytes) {
      return aligned(a, bytes) && aligned(b, bytes) && aligned(out, bytes);
    };
    if (sizes.channels_last) {
      if (sizes.out % kUnit == 0 && aligned(out, 4)) return pixels<kUnit>();
      return pixels<1>();
    }
    if (sizes.pixels % kVector == 0 && all_aligned(16)) return planes<kVector>();
    if (sizes.pixels % 2 == 0 && all_aligned(2 * sizeof(T))) return planes<2>();
    return planes<1>();
  }
};

}  // namespace

cudaError_t launch_join(const void* a, const int32_t* slot_a, const void* b, const int32_t* slot_b, void* out,
                        const ChannelJoin& join, cudaStream_t stream) {
  return with_element(join.element, [&](auto zero) {
    using T = decltype(zero);
    return Join<T>{
        static_cast<const T*>(a), slot_a, static_cast<const T*>(b), slot_b, static_cast<T*>(out), join, stream}
        .run();
  });
}

}  // namespace prunekernels
