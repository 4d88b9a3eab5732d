#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/norm_pass.cuh"

namespace prunekernels {
namespace {

struct NormRelu {
  const float *scale, *offset;  // [places]; y = (x - mean) scale + offset
};

// grad behind a relu of y: 0 where the relu is flat. y as T holds it, as the forward pass saw it.
template <typename T>
PK_DEVICE float behind_relu(float grad, float y) {
  return to_float(from_float<T>(y)) <= 0.0f ? 0.0f : grad;
}

// partial[part, 0] = sum of grad, partial[part, 1] = of grad (x - mean).
template <typename T, int kSpan, bool kRelu>
__global__ void __launch_bounds__(kNormThreads, 2)
    batch_norm_grad_sums_kernel(const T* __restrict__ grad,  // [pixels, channels]
                                const T* __restrict__ x,     // [pixels, channels]
                                const int32_t* __restrict__ feature, const int32_t* __restrict__ place,
                                const float* __restrict__ mean,  // [places]
                                NormRelu relu,
                                float* __restrict__ partial,  // [parts, 2, channels]
                                NormWork work) {
  constexpr int kInFlight = 2;
  const NormThread<kSpan> me(work, feature);
  float sum[2][kSpan] = {};
  if (me.live != 0) {
    float center[kSpan], slope[kRelu ? kSpan : 1], bias[kRelu ? kSpan : 1];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const bool is_live = me.live >> i & 1;
      const int32_t at = is_live ? place[me.channel + i] : 0;
      center[i] = is_live ? mean[at] : 0.0f;
      if constexpr (kRelu) slope[i] = is_live ? relu.scale[at] : 0.0f, bias[i] = is_live ? relu.offset[at] : 0.0f;
    }
    const int64_t stride = static_cast<int64_t>(me.rows) * work.channels;
    int64_t offset = (me.begin + me.row) * work.channels + me.channel;
    for (int64_t pixel = me.begin + me.row; pixel < me.end;
         pixel += me.rows * kInFlight, offset += kInFlight * stride) {
      Vector<T, kSpan> of_x[kInFlight], of_grad[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t from = pixel + k * me.rows < me.end ? offset + k * stride : offset;
        of_x[k] = load_span<T, kSpan>(x + from), of_grad[k] = load_span<T, kSpan>(grad + from);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (pixel + k * me.rows >= me.end) break;
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          const float centered = live_value<T, kSpan>(of_x[k], i, me.live) - center[i];
          float g = live_value<T, kSpan>(of_grad[k], i, me.live);
          if constexpr (kRelu) g = behind_relu<T>(g, centered * slope[i] + bias[i]);
          sum[0][i] += g, sum[1][i] += g * centered;
        }
      }
    }
  }
  write_sums<kSpan>(sum, me, work, partial);
}

struct NormSlopes {  // grad_x = scale grad + factor (x - mean) + offset, each [channels]
  float *scale, *factor, *offset;
};

__global__ void __launch_bounds__(kFinishThreads)
    batch_norm_grad_finish_kernel(const float* __restrict__ partial,  // [parts, 2, channels]
                                  const int32_t* __restrict__ feature, const int32_t* __restrict__ place,
                                  const float* __restrict__ weight,  // [features]
                                  const float* __restrict__ invstd,  // [places]
                                  float* __restrict__ grad_weight,   // [features]
                                  float* __restrict__ grad_bias,     // [features]
                                  NormSlopes slopes, bool training, NormWork work) {
  const int32_t channel = finish_channel();
  const TwoSums sum = sum_of_parts(partial, channel, work);
  if (threadIdx.x >= kFinishChannels || channel >= work.channels) return;
  const int32_t f = feature[channel];
  double scale = 0, factor = 0, offset = 0;
  if (f >= 0) {
    const double inverse = invstd[place[channel]], count = static_cast<double>(work.pixels);
    grad_weight[f] = static_cast<float>(sum.second * inverse);
    grad_bias[f] = static_cast<float>(sum.first);
    scale = inverse * (weight ? weight[f] : 1.0f);
    if (training) factor = -scale * inverse * inverse * sum.second / count, offset = -scale * sum.first / count;
  }
  slopes.scale[channel] = static_cast<float>(scale);
  slopes.factor[channel] = static_cast<float>(factor);
  slopes.offset[channel] = static_cast<float>(offset);
}

template <typename T, int kSpan, bool kRelu>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_grad_apply_kernel(const T* __restrict__ grad,  // [pixels, channels]
                                 const T* __restrict__ x,     // [pixels, channels]
                                 const int32_t* __restrict__ feature, const int32_t* __restrict__ place,
                                 const float* __restrict__ mean,  // [places]
                                 NormRelu relu, NormSlopes slopes,
                                 T* __restrict__ grad_x,  // [pixels, channels]
                                 NormWork work) {
  constexpr int kInFlight = 2;
  const NormThread<kSpan> me(work, feature);
  if (me.channel >= work.channels) return;
  float center[kSpan], scale[kSpan], factor[kSpan], offset[kSpan];
  float slope[kRelu ? kSpan : 1], bias[kRelu ? kSpan : 1];
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    const int32_t channel = me.channel + i;
    const bool is_live = me.live >> i & 1;
    const int32_t from = is_live ? place[channel] : 0;
    center[i] = is_live ? mean[from] : 0.0f;
    if constexpr (kRelu) slope[i] = is_live ? relu.scale[from] : 0.0f, bias[i] = is_live ? relu.offset[from] : 0.0f;
    scale[i] = slopes.scale[channel], factor[i] = slopes.factor[channel], offset[i] = slopes.offset[channel];
  }
  const int64_t stride = static_cast<int64_t>(me.rows) * work.channels;
  int64_t at = (me.begin + me.row) * work.channels + me.channel;
  for (int64_t pixel = me.begin + me.row; pixel < me.end; pixel += me.rows * kInFlight, at += kInFlight * stride) {
    Vector<T, kSpan> of_x[kInFlight] = {}, of_grad[kInFlight] = {};
    if (me.live != 0)
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        if (pixel + k * me.rows < me.end)
          of_x[k] = load_span<T, kSpan>(x + at + k * stride), of_grad[k] = load_span<T, kSpan>(grad + at + k * stride);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pixel + k * me.rows >= me.end) break;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float centered = live_value<T, kSpan>(of_x[k], i, me.live) - center[i];
        float g = live_value<T, kSpan>(of_grad[k], i, me.live);
        if constexpr (kRelu) g = behind_relu<T>(g, centered * slope[i] + bias[i]);
        of_x[k].lanes[i] = from_float<T>(scale[i] * g + factor[i] * centered + offset[i]);
      }
      *reinterpret_cast<Vector<T, kSpan>*>(grad_x + at + k * stride) = of_x[k];
    }
  }
}

}  // namespace

cudaError_t launch_batch_norm_backward(const BatchNormBackward& norm, cudaStream_t stream) {
  const NormShape& shape = norm.shape;
  if (shape.channels > INT32_MAX) return cudaErrorInvalidValue;
  if (shape.pixels == 0 || shape.channels == 0) return cudaSuccess;
  NormWork work = make_work(shape);
  float *const partial = norm.workspace, *const scale = partial + int64_t{2} * work.parts * shape.channels;
  const NormSlopes slopes{scale, scale + shape.channels, scale + 2 * shape.channels};
  const NormRelu behind{norm.relu.scale, norm.relu.offset};
  return with_spans(shape, {norm.x, norm.grad, norm.grad_x}, &work, [&](auto zero, auto span, dim3 grid) {
    return with_flags(false, behind.scale != nullptr, [&](auto, auto relu) {
      using T = decltype(zero);
      constexpr int kSpan = decltype(span)::value;
      constexpr bool kRelu = decltype(relu)::value;
      const T *const x = static_cast<const T*>(norm.x), *const grad = static_cast<const T*>(norm.grad);
      cudaError_t status = launch(batch_norm_grad_sums_kernel<T, kSpan, kRelu>,
                                  {grid, kNormThreads, 2 * kSpan * kNormThreads * sizeof(float)}, stream, grad, x,
                                  shape.feature, shape.place, norm.mean, behind, partial, work);
      if (status != cudaSuccess) return status;
      status = launch(batch_norm_grad_finish_kernel, finish_shape(shape), stream, partial, shape.feature, shape.place,
                      norm.weight, norm.invstd, norm.grad_weight, norm.grad_bias, slopes, norm.training, work);
      if (status != cudaSuccess) return status;
      return launch(batch_norm_grad_apply_kernel<T, kSpan, kRelu>, {grid, kNormThreads, 0}, stream, grad, x,
                    shape.feature, shape.place, norm.mean, behind, slopes, static_cast<T*>(norm.grad_x), work);
    });
  });
}

}  // namespace prunekernels
