// Looks for NaNs and infinities that the dense plan let through, and repairs the result.
#include <algorithm>

#include "cuda/kernels/channel_copy.cuh"
#include "cuda/kernels/nan_repair.h"

namespace prunekernels {
namespace {

constexpr int kRepairThreads = 256;
constexpr int kReadsInFlight = 4;
constexpr int kStretchBlocks = 256;
constexpr int kMostRepairBlocks = 1056;

// Item i is a sentinel channel at one pixel of one image. Neighbouring items are neighbours in memory: pixels of a
// plane (NCHW), sentinel channels of a pixel (NHWC).
struct LeakSplit {
  uint32_t items;
  FastDivide inner, count;  // pixels of a plane (NHWC: sentinels), sentinels
  int64_t channels, pixels;
  bool channels_last;

  struct Place {
    uint32_t sentinel;
    int64_t at;  // element of channel 0
  };
  PK_DEVICE Place place(uint32_t i) const {
    const uint32_t outer = inner(i), rest = i - outer * inner.by;
    if (channels_last) return {rest, static_cast<int64_t>(outer) * channels};
    const uint32_t image = count(outer);
    return {outer - image * count.by, static_cast<int64_t>(image) * channels * pixels + rest};
  }
};

// found[block] = some item of the block is not what its sentinel word demands: all bits 0, or an exponent that is not
// all ones (finite). Blocks and threads take items in turn.
template <typename Bits>
__global__ void __launch_bounds__(kRepairThreads)
    find_leaks_kernel(const Bits* __restrict__ result, const int32_t* __restrict__ sentinels,
                      int32_t* __restrict__ found, uint32_t exponent, LeakSplit split, uint32_t step) {
  bool leaked = false;
  for (uint32_t first = blockIdx.x * kRepairThreads + threadIdx.x; first < split.items;
       first += step * kReadsInFlight) {
    uint32_t value[kReadsInFlight];
    bool zero[kReadsInFlight];
#pragma unroll
    for (int j = 0; j < kReadsInFlight; ++j) {
      const uint32_t i = first + j * step;
      value[j] = 0, zero[j] = true;
      if (i >= split.items) continue;
      const LeakSplit::Place place = split.place(i);
      const int32_t word = sentinels[place.sentinel];
      value[j] = result[place.at + static_cast<int64_t>(word >> 1) * (split.channels_last ? 1 : split.pixels)];
      zero[j] = word & 1;
    }
#pragma unroll
    for (int j = 0; j < kReadsInFlight; ++j) leaked |= zero[j] ? value[j] != 0 : (value[j] & exponent) == exponent;
  }
  const bool any = __syncthreads_or(leaked);
  if (threadIdx.x == 0) found[blockIdx.x] = any;
}

// Images that one launch searches: indices have 32 bits, and run past the last item by less than a round.
int64_t stretch_images(const LeakSearch& s) {
  constexpr int64_t kMost = (int64_t{1} << 31) - kStretchBlocks * kRepairThreads * kReadsInFlight;
  return std::min(s.images, kMost / std::max<int64_t>(1, s.pixels * s.sentinels.count));
}

int stretch_blocks(const LeakSearch& s, int64_t images) {
  const int64_t items = images * s.pixels * s.sentinels.count;
  return static_cast<int>(std::min<int64_t>((items + kRepairThreads - 1) / kRepairThreads, kStretchBlocks));
}

template <typename Bits>
cudaError_t find_leaks(const LeakSearch& s, uint32_t exponent, int32_t* found, cudaStream_t stream) {
  const int64_t stretch = stretch_images(s);
  if (stretch == 0) return cudaErrorInvalidValue;
  const auto count = static_cast<uint32_t>(s.sentinels.count);
  const auto inner = s.channels_last ? count : static_cast<uint32_t>(s.pixels);
  for (int64_t n = 0; n < s.images; n += stretch) {
    const int64_t images = std::min(stretch, s.images - n);
    const int blocks = stretch_blocks(s, images);
    const LeakSplit split{static_cast<uint32_t>(images * s.pixels * count),
                          FastDivide(inner),
                          FastDivide(count),
                          s.channels,
                          s.pixels,
                          s.channels_last};
    const cudaError_t status =
        launch(find_leaks_kernel<Bits>, {static_cast<unsigned>(blocks), kRepairThreads, 0}, stream,
               static_cast<const Bits*>(s.result) + n * s.channels * s.pixels, s.sentinels.words, found, exponent,
               split, static_cast<uint32_t>(blocks * kRepairThreads));
    if (status != cudaSuccess) return status;
    found += blocks;
  }
  return cudaSuccess;
}

// ---- repair

// The sizes in struct Repair as the kernel takes them: result [images, to, height, width], operand [images, from, ...].
struct RepairShape {
  int64_t images;
  int32_t to, height, width, from, from_height, from_width;
  int32_t to_per_group, from_per_group, pair_words;
  int32_t taps[2], stride[2], padding[2], dilation[2];
  WeightStrides weight;
  bool channels_last;
};

// The operand position that result position `at` meets through a tap, or -1.
template <bool kForward>
PK_DEVICE int meets(int at, int tap, int stride, int padding, int dilation, int size) {
  int p = kForward ? at * stride - padding + tap * dilation : at + padding - tap * dilation;
  if constexpr (!kForward) {
    if (p < 0 || p % stride != 0) return -1;
    p /= stride;
  }
  return p >= 0 && p < size ? p : -1;
}

// One element of the result: the sum over the live kernels between its channel and the operand channels of its group.
template <bool kForward, typename T>
PK_DEVICE float repaired(const RepairShape& s, const T* image, const T* weight, const uint32_t* pairs, int channel,
                         int row, int column) {
  const int group = channel / s.to_per_group, in_group = channel - group * s.to_per_group;
  const int first = group * s.from_per_group;
  const int64_t pixels = static_cast<int64_t>(s.from_height) * s.from_width;
  float sum = 0;
  for (int j = 0; j < s.from_per_group; ++j) {
    const int k = kForward ? channel : first + j, c = kForward ? j : in_group;
    if (!(pairs[static_cast<int64_t>(k) * s.pair_words + (c >> 5)] >> (c & 31) & 1)) continue;
    const T* plane = image + (first + j) * (s.channels_last ? 1 : pixels);
    const T* kernel = weight + k * s.weight.row + c * s.weight.channel;
    for (int r = 0; r < s.taps[0]; ++r) {
      const int h = meets<kForward>(row, r, s.stride[0], s.padding[0], s.dilation[0], s.from_height);
      if (h < 0) continue;
      for (int t = 0; t < s.taps[1]; ++t) {
        const int w = meets<kForward>(column, t, s.stride[1], s.padding[1], s.dilation[1], s.from_width);
        if (w < 0) continue;
        const int64_t at = static_cast<int64_t>(h) * s.from_width + w;
        sum = fmaf(to_float(plane[s.channels_last ? at * s.from : at]),
                   to_float(kernel[(r * s.taps[1] + t) * s.weight.tap]), sum);
      }
    }
  }
  return sum;
}

// Threads take elements of the result in turn, in the order of memory.
template <bool kForward, typename T>
PK_DEVICE void repair_all(const RepairShape& s, const T* operand, const T* weight, const T* bias, T* result,
                          const int32_t* slot, const uint32_t* pairs) {
  const int64_t pixels = static_cast<int64_t>(s.height) * s.width, count = s.images * s.to * pixels;
  const int64_t operand_image = static_cast<int64_t>(s.from) * s.from_height * s.from_width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRepairThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRepairThreads + threadIdx.x; i < count; i += step) {
    const int64_t inner = s.channels_last ? s.to : pixels, outer = i / inner, rest = i - outer * inner;
    const int64_t image = outer / (s.channels_last ? pixels : s.to);
    const int64_t other = outer - image * (s.channels_last ? pixels : s.to);
    const int channel = static_cast<int>(s.channels_last ? rest : other);
    const int pixel = static_cast<int>(s.channels_last ? other : rest);
    float sum = 0;
    if (slot[channel] != kDead) {
      sum = repaired<kForward>(s, operand + image * operand_image, weight, pairs, channel, pixel / s.width,
                               pixel % s.width);
      if (bias) sum += to_float(bias[channel]);
    }
    result[i] = from_float<T>(sum);
  }
}

PK_DEVICE bool nothing_found(const int32_t* found, int count) {
  bool any = found == nullptr;
  for (int i = threadIdx.x; i < count; i += kRepairThreads) any |= found[i] != 0;
  return !__syncthreads_or(any);
}

template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    repair_fwd_kernel(RepairShape shape, const T* operand, const T* weight, const T* bias, T* result,
                      const int32_t* slot, const uint32_t* pairs, const int32_t* found, int count) {
  if (nothing_found(found, count)) return;
  repair_all<true>(shape, operand, weight, bias, result, slot, pairs);
}
template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    repair_grad_input_kernel(RepairShape shape, const T* operand, const T* weight, const T* bias, T* result,
                             const int32_t* slot, const uint32_t* pairs, const int32_t* found, int count) {
  if (nothing_found(found, count)) return;
  repair_all<false>(shape, operand, weight, bias, result, slot, pairs);
}

RepairShape repair_shape(const Repair& r, bool forward) {
  const ConvShape& s = r.shape;
  const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
  const int32_t K = small(s.K), P = small(s.P), Q = small(s.Q), C = small(s.C), H = small(s.H), W = small(s.W);
  const int32_t Kg = small(s.K / s.G), Cg = small(s.C / s.G);
  RepairShape shape = forward ? RepairShape{s.N, K, P, Q, C, H, W, Kg, Cg} : RepairShape{s.N, C, H, W, K, P, Q, Cg, Kg};
  shape.pair_words = small(pair_words(Cg));
  shape.taps[0] = small(s.R), shape.taps[1] = small(s.S);
  for (int i = 0; i < 2; ++i) {
    shape.stride[i] = small(s.stride[i]);
    shape.padding[i] = small(s.padding[i]);
    shape.dilation[i] = small(s.dilation[i]);
  }
  shape.weight = r.strides;
  shape.channels_last = r.channels_last;
  return shape;
}

template <typename T>
cudaError_t repair(const Repair& r, bool forward, const int32_t* found, int count, cudaStream_t stream) {
  const RepairShape shape = repair_shape(r, forward);
  const int64_t needed = (shape.images * shape.to * shape.height * shape.width + kRepairThreads - 1) / kRepairThreads;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(needed, kMostRepairBlocks));
  return launch(forward ? repair_fwd_kernel<T> : repair_grad_input_kernel<T>, {blocks, kRepairThreads, 0}, stream,
                shape, static_cast<const T*>(r.operand), static_cast<const T*>(r.weight), static_cast<const T*>(r.bias),
                static_cast<T*>(r.result), r.slot, r.pairs, found, count);
}

cudaError_t repair(const Repair& r, bool forward, const int32_t* found, int count, cudaStream_t stream) {
  if (found && count == 0) return cudaSuccess;
  return with_element(r.element, [&](auto zero) { return repair<decltype(zero)>(r, forward, found, count, stream); });
}

}  // namespace

int leak_blocks(const LeakSearch& s) {
  const int64_t stretch = stretch_images(s);
  if (stretch == 0) return 0;
  const int rest = stretch_blocks(s, s.images % stretch);
  return static_cast<int>(s.images / stretch) * stretch_blocks(s, stretch) + rest;
}

cudaError_t launch_find_leaks(const LeakSearch& s, int32_t* found, cudaStream_t stream) {
  if (s.images * s.pixels * s.sentinels.count == 0) return cudaSuccess;
  switch (s.element) {
    case Element::bf16:
      return find_leaks<uint16_t>(s, 0x7f80, found, stream);
    case Element::f16:
      return find_leaks<uint16_t>(s, 0x7c00, found, stream);
    default:
      return find_leaks<uint32_t>(s, 0x7f800000, found, stream);
  }
}

cudaError_t launch_repair_fwd(const Repair& r, const int32_t* found, int count, cudaStream_t stream) {
  return repair(r, true, found, count, stream);
}

cudaError_t launch_repair_grad_input(const Repair& r, const int32_t* found, int count, cudaStream_t stream) {
  return repair(r, false, found, count, stream);
}

}  // namespace prunekernels
