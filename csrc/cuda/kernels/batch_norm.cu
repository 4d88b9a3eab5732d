#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/norm_pass.cuh"

namespace prunekernels {
namespace {

// partial[part, 0] = sum of x - shift, partial[part, 1] = of its square; shift: the channel's first value.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_sums_kernel(const T* __restrict__ x,  // [pixels, channels]
                           const int32_t* __restrict__ feature,
                           float* __restrict__ partial,  // [parts, 2, channels]
                           float* __restrict__ shifts,   // [channels]
                           NormWork work) {
  constexpr int kInFlight = 4;
  const NormThread<kSpan> me(work, feature);
  float sum[2][kSpan] = {}, shift[kSpan] = {};
  if (me.live != 0) {
    const Vector<T, kSpan> first = load_span<T, kSpan>(x + me.channel);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) shift[i] = live_value<T, kSpan>(first, i, me.live);
    if (blockIdx.y == 0 && me.row == 0)
#pragma unroll
      for (int i = 0; i < kSpan; ++i) shifts[me.channel + i] = shift[i];
    const int64_t stride = static_cast<int64_t>(me.rows) * work.channels;
    const T* at = x + (me.begin + me.row) * work.channels + me.channel;
    for (int64_t pixel = me.begin + me.row; pixel < me.end; pixel += me.rows * kInFlight, at += kInFlight * stride) {
      Vector<T, kSpan> raw[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        raw[k] = pixel + k * me.rows < me.end ? load_span<T, kSpan>(at + k * stride) : first;  // adds zeros
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          const float value = live_value<T, kSpan>(raw[k], i, me.live) - shift[i];
          const float counted = pixel + k * me.rows < me.end ? value : 0.0f;
          sum[0][i] += counted, sum[1][i] += counted * counted;
        }
    }
  }
  write_sums<kSpan>(sum, me, work, partial);
}

struct NormStatistics {
  const float *weight, *bias;             // [features]
  float *running_mean, *running_var;      // [features]
  float *mean, *invstd, *scale, *offset;  // [places]; y = (x - mean) scale + offset
  double momentum, eps;
  bool training;
};

PK_DEVICE void move(float* running, double value, double momentum) {
  *running = static_cast<float>(*running + momentum * (value - *running));
}

__global__ void __launch_bounds__(kFinishThreads)
    batch_norm_finish_kernel(const float* __restrict__ partial,  // [parts, 2, channels]
                             const float* __restrict__ shifts,   // [channels]
                             const int32_t* __restrict__ feature, const int32_t* __restrict__ place, NormStatistics to,
                             NormWork work) {
  const int32_t channel = finish_channel();
  const TwoSums sum = sum_of_parts(partial, channel, work);
  if (threadIdx.x >= kFinishChannels || channel >= work.channels) return;
  const int32_t at = place[channel], f = feature[channel];
  if (at < 0) return;
  double mean = 0, invstd = 0;
  float gamma = 0, beta = 0;
  if (f >= 0) gamma = to.weight ? to.weight[f] : 1.0f, beta = to.bias ? to.bias[f] : 0.0f;
  if (f >= 0 && to.training) {
    const double count = static_cast<double>(work.pixels), offset = sum.first / count;
    const double spread = sum.second / count - offset * offset, variance = spread < 0 ? 0 : spread;
    mean = shifts[channel] + offset, invstd = 1 / sqrt(variance + to.eps);
    if (to.running_mean) move(to.running_mean + f, mean, to.momentum);
    if (to.running_var) move(to.running_var + f, variance * count / (count - 1), to.momentum);
  } else if (f >= 0) {
    mean = to.running_mean[f], invstd = 1 / sqrt(to.running_var[f] + to.eps);
  }
  to.mean[at] = static_cast<float>(mean), to.invstd[at] = static_cast<float>(invstd);
  to.scale[at] = static_cast<float>(invstd) * gamma, to.offset[at] = beta;
}

// y = (x - mean) scale + offset, kAdd: + add, kRelu: relu of that.
template <typename T, int kSpan, bool kAdd, bool kRelu>
__global__ void __launch_bounds__(kNormThreads, 3)    // else ptxas spills for sm_100, to make room for a fourth
    batch_norm_apply_kernel(const T* __restrict__ x,  // [pixels, channels]
                            const int32_t* __restrict__ feature, const int32_t* __restrict__ place,
                            const float* __restrict__ mean, const float* __restrict__ scales,
                            const float* __restrict__ offsets,  // [places] each
                            const T* __restrict__ add,          // [pixels, channels]
                            T* __restrict__ y,                  // [pixels, channels]
                            NormWork work) {
  constexpr int kInFlight = kAdd ? 2 : 4;
  const NormThread<kSpan> me(work, feature);
  if (me.channel >= work.channels) return;
  float center[kSpan], scale[kSpan], offset[kSpan];
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    const bool is_live = me.live >> i & 1;
    const int32_t at = is_live ? place[me.channel + i] : 0;
    center[i] = is_live ? mean[at] : 0.0f;
    scale[i] = is_live ? scales[at] : 0.0f;
    offset[i] = is_live ? offsets[at] : 0.0f;
  }
  const int64_t stride = static_cast<int64_t>(me.rows) * work.channels;
  int64_t at = (me.begin + me.row) * work.channels + me.channel;
  for (int64_t pixel = me.begin + me.row; pixel < me.end; pixel += me.rows * kInFlight, at += kInFlight * stride) {
    Vector<T, kSpan> raw[kInFlight] = {}, added[kAdd ? kInFlight : 1] = {};
    if (me.live != 0)
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        if (pixel + k * me.rows < me.end) {
          raw[k] = load_span<T, kSpan>(x + at + k * stride);
          if constexpr (kAdd) added[k] = load_span<T, kSpan>(add + at + k * stride);
        }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pixel + k * me.rows >= me.end) break;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        float value = (live_value<T, kSpan>(raw[k], i, me.live) - center[i]) * scale[i] + offset[i];
        if constexpr (kAdd) value = to_float(from_float<T>(value)) + live_value<T, kSpan>(added[k], i, me.live);
        if constexpr (kRelu) value = value <= 0.0f ? 0.0f : value;
        raw[k].lanes[i] = from_float<T>(value);
      }
      *reinterpret_cast<Vector<T, kSpan>*>(y + at + k * stride) = raw[k];
    }
  }
}

}  // namespace

int64_t batch_norm_workspace(const NormShape& shape) {
  return (2 * static_cast<int64_t>(part_count(shape)) + 3) * shape.channels;
}

cudaError_t launch_batch_norm(const BatchNorm& norm, cudaStream_t stream) {
  const NormShape& shape = norm.shape;
  if (shape.channels > INT32_MAX) return cudaErrorInvalidValue;
  if (shape.pixels == 0 || shape.channels == 0) return cudaSuccess;
  NormWork work = make_work(shape), finish = work;
  if (!norm.training) finish.parts = 0;
  float *const partial = norm.workspace, *const shifts = partial + int64_t{2} * work.parts * shape.channels;
  const NormScales scales =
      norm.scales.scale ? norm.scales : NormScales{shifts + shape.channels, shifts + 2 * shape.channels};
  const cudaError_t status = with_spans(shape, {norm.x}, &work, [&](auto zero, auto span, dim3 grid) {
    using T = decltype(zero);
    constexpr int kSpan = decltype(span)::value;
    const T* const x = static_cast<const T*>(norm.x);
    cudaError_t status = cudaSuccess;
    if (norm.training)
      status = launch(batch_norm_sums_kernel<T, kSpan>, {grid, kNormThreads, 2 * kSpan * kNormThreads * sizeof(float)},
                      stream, x, shape.feature, partial, shifts, work);
    if (status != cudaSuccess) return status;
    const NormStatistics statistics{norm.weight,   norm.bias,   norm.running_mean, norm.running_var,
                                    norm.mean,     norm.invstd, scales.scale,      scales.offset,
                                    norm.momentum, norm.eps,    norm.training};
    return launch(batch_norm_finish_kernel, finish_shape(shape), stream, partial, shifts, shape.feature, shape.place,
                  statistics, finish);
  });
  if (status != cudaSuccess || !norm.y) return status;
  return launch_batch_norm_apply({shape, norm.mean, scales, norm.x, nullptr, false, norm.y}, stream);
}

cudaError_t launch_batch_norm_apply(const BatchNormApply& norm, cudaStream_t stream) {
  const NormShape& shape = norm.shape;
  if (shape.channels > INT32_MAX) return cudaErrorInvalidValue;
  if (shape.pixels == 0 || shape.channels == 0) return cudaSuccess;
  NormWork work = make_work(shape);
  const void* const add = norm.add ? norm.add : norm.x;
  return with_spans(shape, {norm.x, norm.y, add}, &work, [&](auto zero, auto span, dim3 grid) {
    return with_flags(norm.add != nullptr, norm.relu, [&](auto adds, auto relu) {
      using T = decltype(zero);
      return launch(batch_norm_apply_kernel<T, decltype(span)::value, decltype(adds)::value, decltype(relu)::value>,
                    {grid, kNormThreads, 0}, stream, static_cast<const T*>(norm.x), shape.feature, shape.place,
                    norm.mean, norm.scales.scale, norm.scales.offset, static_cast<const T*>(norm.add),
                    static_cast<T*>(norm.y), work);
    });
  });
}

}  // namespace prunekernels
