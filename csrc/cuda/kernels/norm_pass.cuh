// Passes of a batch norm over an activation [pixels, channels], in which sums per channel are formed.
//   NormWork, NormThread      how pixels and channels are cut among threads
//   write_sums, sum_of_parts  two sums a channel: of a block, and of all blocks, in an order that the problem decides
//   with_spans                a launch with whole vectors of channels, where all tensors have them
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {

constexpr int kNormThreads = 256;
constexpr int kMostParts = 512;
constexpr int kFinishChannels = 32, kFinishRows = 16, kFinishThreads = kFinishChannels * kFinishRows;

// How the pixels are cut: thread (lane, row) of block (x, y) has kSpan channels and every rows-th pixel of part y.
struct NormWork {
  int64_t pixels;
  int32_t channels, parts, lanes;  // lanes: threads side by side over channels, a power of two
};

template <int kSpan>
struct NormThread {
  int32_t channel;
  int row, rows;
  int64_t begin, end;
  uint32_t live = 0;  // bit i: channel + i is

  PK_DEVICE NormThread(const NormWork& work, const int32_t* feature)
      : channel((blockIdx.x * work.lanes + threadIdx.x % work.lanes) * kSpan),
        row(threadIdx.x / work.lanes),
        rows(kNormThreads / work.lanes) {
    const int64_t share = (work.pixels + work.parts - 1) / work.parts;
    begin = blockIdx.y * share;
    end = begin + share < work.pixels ? begin + share : work.pixels;
    if (channel >= work.channels) return;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) live |= static_cast<uint32_t>(feature[channel + i] >= 0) << i;
  }
};

// Dead channels give zeros, whatever they hold.
template <typename T, int kSpan>
PK_DEVICE float live_value(const Vector<T, kSpan>& raw, int i, uint32_t live) {
  return live >> i & 1 ? to_float(raw.lanes[i]) : 0.0f;
}

template <typename T, int kSpan>
PK_DEVICE Vector<T, kSpan> load_span(const T* at) {
  return *reinterpret_cast<const Vector<T, kSpan>*>(at);
}

// partial[part, 0 or 1, channel] = sums over the rows of the block; the threads of row 0 write.
template <int kSpan>
PK_DEVICE void write_sums(float (&sum)[2][kSpan], const NormThread<kSpan>& me, const NormWork& work, float* partial) {
  const Shared<float> shared(0);  // [2, kSpan, kNormThreads]; the upper half of the rows writes
  for (int half = me.rows / 2; half > 0; half /= 2) {
    if (me.row >= half && me.row < 2 * half)
#pragma unroll
      for (int i = 0; i < 2 * kSpan; ++i) shared.set(threadIdx.x + i * kNormThreads, sum[i / kSpan][i % kSpan]);
    __syncthreads();
    if (me.row < half)
#pragma unroll
      for (int i = 0; i < 2 * kSpan; ++i)
        sum[i / kSpan][i % kSpan] += shared.get(threadIdx.x + half * work.lanes + i * kNormThreads);
  }
  if (me.row != 0 || me.channel >= work.channels) return;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    float* const to = partial + (static_cast<int64_t>(blockIdx.y) * 2) * work.channels + me.channel + i;
    to[0] = sum[0][i], to[work.channels] = sum[1][i];
  }
}

struct TwoSums {
  double first, second;
};

// The sums of all parts for the channel of this thread, known to the threads of row 0. Thread (channel, row) adds every
// kFinishRows-th part.
PK_DEVICE TwoSums sum_of_parts(const float* partial, int32_t channel, const NormWork& work) {
  const int lane = threadIdx.x % kFinishChannels, row = threadIdx.x / kFinishChannels;
  TwoSums sum{0, 0};
  if (channel < work.channels)
#pragma unroll 4
    for (int part = row; part < work.parts; part += kFinishRows) {
      const float* const of = partial + (static_cast<int64_t>(part) * 2) * work.channels + channel;
      sum.first += of[0], sum.second += of[work.channels];
    }
  const Shared<double> shared(0);  // [2, kFinishRows, kFinishChannels]
  shared.set(threadIdx.x, sum.first), shared.set(kFinishThreads + threadIdx.x, sum.second);
  __syncthreads();
  if (row == 0)
    for (int other = 1; other < kFinishRows; ++other) {
      sum.first += shared.get(other * kFinishChannels + lane);
      sum.second += shared.get(kFinishThreads + other * kFinishChannels + lane);
    }
  return sum;
}

PK_DEVICE int32_t finish_channel() {
  return static_cast<int32_t>(blockIdx.x * kFinishChannels + threadIdx.x % kFinishChannels);
}

// ---- launches

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough blocks to fill a large GPU. Depends on the problem alone, so that results do not depend on the device.
inline int32_t part_count(const NormShape& shape) {
  const int64_t wanted = std::max<int64_t>(2048 / ceil_div(std::max<int64_t>(shape.channels, 1), 256), 1);
  return static_cast<int32_t>(std::min<int64_t>({wanted, ceil_div(shape.pixels, 64), kMostParts}));
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// visit(T{}, std::integral_constant<int, kSpan>{}, whole grid): whole vectors where all tensors have them.
template <typename Visit>
cudaError_t with_spans(const NormShape& shape, std::initializer_list<const void*> tensors, NormWork* work,
                       Visit visit) {
  return with_element(shape.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSpan = 16 / sizeof(T);
    const bool whole = shape.channels % kSpan == 0 && std::all_of(tensors.begin(), tensors.end(), aligned);
    const int64_t spans = whole ? shape.channels / kSpan : shape.channels;
    work->lanes = 1;
    while (work->lanes < kWarp && work->lanes < spans) work->lanes *= 2;
    const dim3 grid(static_cast<unsigned>(ceil_div(spans, work->lanes)), static_cast<unsigned>(work->parts));
    return whole ? visit(zero, std::integral_constant<int, kSpan>{}, grid)
                 : visit(zero, std::integral_constant<int, 1>{}, grid);
  });
}

// visit(std::bool_constant<a>{}, std::bool_constant<b>{})
template <typename Visit>
cudaError_t with_flags(bool a, bool b, Visit visit) {
  const auto second = [&](auto first) { return b ? visit(first, std::true_type{}) : visit(first, std::false_type{}); };
  return a ? second(std::true_type{}) : second(std::false_type{});
}

inline NormWork make_work(const NormShape& shape) {
  return {shape.pixels, static_cast<int32_t>(shape.channels), part_count(shape), 1};
}

inline LaunchShape finish_shape(const NormShape& shape) {
  return {dim3(static_cast<unsigned>(ceil_div(shape.channels, kFinishChannels))), dim3(kFinishThreads),
          2 * kFinishThreads * sizeof(double)};
}

}  // namespace prunekernels
