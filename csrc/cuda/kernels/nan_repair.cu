// Looks for NaNs and infinities that the dense plan let through, and repairs the pixels where it finds one.
#include <algorithm>

#include "cuda/kernels/channel_copy.cuh"
#include "cuda/kernels/nan_repair.h"

namespace prunekernels {
namespace {

constexpr int kRepairThreads = 256;
constexpr int kRepairBlocks = 2;  // at least so many on a multiprocessor; without this bound ptxas spills registers
constexpr int kReadsInFlight = 4;
constexpr int kStretchBlocks = 256;
constexpr size_t kRepairSharedBytes = (2 * kRepairThreads + 1) * sizeof(uint32_t);

// Item i is a sentinel channel at one pixel of one image. Neighbouring items are neighbours in memory: pixels of a
// plane (NCHW), sentinel channels of a pixel (NHWC).
struct LeakSplit {
  uint32_t items;
  FastDivide inner, count, pixels;  // pixels of a plane (NHWC: sentinels), sentinels, pixels of an image
  uint32_t channels;
  bool channels_last;

  struct Place {
    uint32_t sentinel, image, pixel;
  };
  PK_DEVICE Place place(uint32_t i) const {
    const uint32_t outer = inner(i), rest = i - outer * inner.by;
    const uint32_t image = channels_last ? pixels(outer) : count(outer);
    return channels_last ? Place{rest, image, outer - image * pixels.by} : Place{outer - image * count.by, image, rest};
  }
  PK_DEVICE int64_t element(const Place& at, uint32_t channel) const {
    return channels_last ? (static_cast<int64_t>(at.image) * pixels.by + at.pixel) * channels + channel
                         : (static_cast<int64_t>(at.image) * channels + channel) * pixels.by + at.pixel;
  }
};

PK_DEVICE uint32_t bits_of(BFloat16 value) { return value.bits; }
PK_DEVICE uint32_t bits_of(Half value) { return value.bits; }
PK_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
template <typename T>
constexpr uint32_t kExponent = 0x7f800000;
template <>
constexpr uint32_t kExponent<BFloat16> = 0x7f80;
template <>
constexpr uint32_t kExponent<Half> = 0x7c00;

// Whether the channel is not what its sentinel word demands: all bits 0, or an exponent that is not all ones (finite).
template <typename T>
PK_DEVICE bool leaked(uint32_t bits, bool zero) {
  return zero ? bits != 0 : (bits & kExponent<T>) == kExponent<T>;
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

// Computes the channels of a sentinel's group at the pixels of some items; threads take them in turn. items: in shared
// memory, `count` of them.
template <bool kForward, typename T>
PK_DEVICE void repair_items(const RepairShape& s, const LeakSplit& split, const int32_t* sentinels, const T* operand,
                            const T* weight, const T* bias, T* result, const int32_t* slot, const uint32_t* pairs,
                            Shared<uint32_t> items, int count) {
  const int64_t operand_image = static_cast<int64_t>(s.from) * s.from_height * s.from_width;
  for (int i = threadIdx.x; i < count * s.to_per_group; i += kRepairThreads) {
    const LeakSplit::Place at = split.place(items.get(i / s.to_per_group));
    const int group = (sentinels[at.sentinel] >> 1) / s.to_per_group;
    const int channel = group * s.to_per_group + i % s.to_per_group;
    float sum = 0;
    if (slot[channel] != kDead) {
      sum = repaired<kForward>(s, operand + at.image * operand_image, weight, pairs, channel, at.pixel / s.width,
                               at.pixel % s.width);
      if (bias) sum += to_float(bias[channel]);
    }
    result[split.element(at, channel)] = from_float<T>(sum);
  }
}

// Blocks and threads take items in turn, `step` apart; a block repairs what its threads have found in a round.
template <bool kForward, typename T>
PK_DEVICE void repair_leaks(const RepairShape& s, const LeakSplit& split, const int32_t* sentinels, const T* operand,
                            const T* weight, const T* bias, T* result, const int32_t* slot, const uint32_t* pairs) {
  const uint32_t step = gridDim.x * kRepairThreads;
  for (uint32_t block = blockIdx.x * kRepairThreads; block < split.items; block += step * kReadsInFlight) {
    uint32_t value[kReadsInFlight];
    bool zero[kReadsInFlight];
    uint32_t found = 0;  // bit j: item j of this thread
#pragma unroll
    for (int j = 0; j < kReadsInFlight; ++j) {
      const uint32_t i = block + threadIdx.x + j * step;
      value[j] = 0, zero[j] = true;
      if (i >= split.items) continue;
      const LeakSplit::Place at = split.place(i);
      const int32_t word = sentinels[at.sentinel];
      value[j] = bits_of(result[split.element(at, word >> 1)]);
      zero[j] = word & 1;
    }
#pragma unroll
    for (int j = 0; j < kReadsInFlight; ++j) found |= static_cast<uint32_t>(leaked<T>(value[j], zero[j])) << j;
    if (!__syncthreads_or(found != 0)) continue;

    const Shared<uint32_t> flags(0), items(kRepairThreads * sizeof(uint32_t)),
        count(2 * kRepairThreads * sizeof(uint32_t));
#pragma unroll 1
    for (int j = 0; j < kReadsInFlight; ++j) {
      flags.set(threadIdx.x, found >> j & 1);
      __syncthreads();
      if (threadIdx.x == 0) {
        int listed = 0;
        for (int t = 0; t < kRepairThreads; ++t)
          if (flags.get(t)) items.set(listed++, block + t + j * step);
        count.set(0, listed);
      }
      __syncthreads();
      repair_items<kForward>(s, split, sentinels, operand, weight, bias, result, slot, pairs, items,
                             static_cast<int>(count.get(0)));
      __syncthreads();  // the list is read, and may be written again
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRepairThreads, kRepairBlocks)
    repair_fwd_kernel(RepairShape shape, LeakSplit split, const int32_t* sentinels, const T* operand, const T* weight,
                      const T* bias, T* result, const int32_t* slot, const uint32_t* pairs) {
  repair_leaks<true>(shape, split, sentinels, operand, weight, bias, result, slot, pairs);
}
template <typename T>
__global__ void __launch_bounds__(kRepairThreads, kRepairBlocks)
    repair_grad_input_kernel(RepairShape shape, LeakSplit split, const int32_t* sentinels, const T* operand,
                             const T* weight, const T* bias, T* result, const int32_t* slot, const uint32_t* pairs) {
  repair_leaks<false>(shape, split, sentinels, operand, weight, bias, result, slot, pairs);
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

// One launch, but for more items than 32-bit indices hold: a launch for each stretch of images then.
template <typename T>
cudaError_t repair(const Repair& r, bool forward, cudaStream_t stream) {
  constexpr int64_t kMost = (int64_t{1} << 31) - kStretchBlocks * kRepairThreads * kReadsInFlight;
  RepairShape shape = repair_shape(r, forward);
  const int64_t images = shape.images, pixels = static_cast<int64_t>(shape.height) * shape.width;
  const int64_t image_items = pixels * r.sentinels.count;
  if (images * image_items == 0) return cudaSuccess;
  if (image_items > kMost) return cudaErrorInvalidValue;
  const int64_t stretch = std::min(images, kMost / image_items);
  const int64_t from_image = static_cast<int64_t>(shape.from) * shape.from_height * shape.from_width;
  const auto count = static_cast<uint32_t>(r.sentinels.count);
  for (int64_t n = 0; n < images; n += stretch) {
    shape.images = std::min(stretch, images - n);
    const int64_t items = shape.images * image_items;
    const LeakSplit split{static_cast<uint32_t>(items),
                          FastDivide(r.channels_last ? count : static_cast<uint32_t>(pixels)),
                          FastDivide(count),
                          FastDivide(static_cast<uint32_t>(pixels)),
                          static_cast<uint32_t>(shape.to),
                          r.channels_last};
    const auto blocks =
        static_cast<unsigned>(std::min<int64_t>((items + kRepairThreads - 1) / kRepairThreads, kStretchBlocks));
    const cudaError_t status =
        launch(forward ? repair_fwd_kernel<T> : repair_grad_input_kernel<T>,
               {dim3(blocks), dim3(kRepairThreads), kRepairSharedBytes}, stream, shape, split, r.sentinels.words,
               static_cast<const T*>(r.operand) + n * from_image, static_cast<const T*>(r.weight),
               static_cast<const T*>(r.bias), static_cast<T*>(r.result) + n * shape.to * pixels, r.slot, r.pairs);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t repair(const Repair& r, bool forward, cudaStream_t stream) {
  return with_element(r.element, [&](auto zero) { return repair<decltype(zero)>(r, forward, stream); });
}

}  // namespace

cudaError_t launch_repair_fwd(const Repair& r, cudaStream_t stream) { return repair(r, true, stream); }

cudaError_t launch_repair_grad_input(const Repair& r, cudaStream_t stream) { return repair(r, false, stream); }

}  // namespace prunekernels
