#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {
namespace {

constexpr int kThreads = 256;
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
        rows(kThreads / work.lanes) {
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
PK_DEVICE Vector<T, kSpan> load(const T* at) {
  return *reinterpret_cast<const Vector<T, kSpan>*>(at);
}

// partial[part, 0 or 1, channel] = sums over the rows of the block; the threads of row 0 write.
template <int kSpan>
PK_DEVICE void write_sums(float (&sum)[2][kSpan], const NormThread<kSpan>& me, const NormWork& work, float* partial) {
  const Shared<float> shared(0);  // [2, kSpan, kThreads]; the upper half of the rows writes
  for (int half = me.rows / 2; half > 0; half /= 2) {
    if (me.row >= half && me.row < 2 * half)
#pragma unroll
      for (int i = 0; i < 2 * kSpan; ++i) shared.set(threadIdx.x + i * kThreads, sum[i / kSpan][i % kSpan]);
    __syncthreads();
    if (me.row < half)
#pragma unroll
      for (int i = 0; i < 2 * kSpan; ++i)
        sum[i / kSpan][i % kSpan] += shared.get(threadIdx.x + half * work.lanes + i * kThreads);
  }
  if (me.row != 0 || me.channel >= work.channels) return;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    float* const to = partial + (static_cast<int64_t>(blockIdx.y) * 2) * work.channels + me.channel + i;
    to[0] = sum[0][i], to[work.channels] = sum[1][i];
  }
}

// partial[part, 0] = sum of x - shift, partial[part, 1] = of its square; shift: the channel's first value.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kThreads) batch_norm_sums_kernel(const T* __restrict__ x,  // [pixels, channels]
                                                                   const int32_t* __restrict__ feature,
                                                                   float* __restrict__ partial,  // [parts, 2, channels]
                                                                   float* __restrict__ shifts,   // [channels]
                                                                   NormWork work) {
  constexpr int kInFlight = 4;
  const NormThread<kSpan> me(work, feature);
  float sum[2][kSpan] = {}, shift[kSpan] = {};
  if (me.live != 0) {
    const Vector<T, kSpan> first = load<T, kSpan>(x + me.channel);
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
        raw[k] = pixel + k * me.rows < me.end ? load<T, kSpan>(at + k * stride) : first;  // adds zeros
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
__global__ void __launch_bounds__(kThreads, 2)
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
        of_x[k] = load<T, kSpan>(x + from), of_grad[k] = load<T, kSpan>(grad + from);
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

// y = (x - mean) scale + offset, kAdd: + add, kRelu: relu of that.
template <typename T, int kSpan, bool kAdd, bool kRelu>
__global__ void __launch_bounds__(kThreads, 3)        // else ptxas spills for sm_100, to make room for a fourth
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
          raw[k] = load<T, kSpan>(x + at + k * stride);
          if constexpr (kAdd) added[k] = load<T, kSpan>(add + at + k * stride);
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

template <typename T, int kSpan, bool kRelu>
__global__ void __launch_bounds__(kThreads)
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
          of_x[k] = load<T, kSpan>(x + at + k * stride), of_grad[k] = load<T, kSpan>(grad + at + k * stride);
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

// ---- launches

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough blocks to fill a large GPU. Depends on the problem alone, so that results do not depend on the device.
int32_t part_count(const NormShape& shape) {
  const int64_t wanted = std::max<int64_t>(2048 / ceil_div(std::max<int64_t>(shape.channels, 1), 256), 1);
  return static_cast<int32_t>(std::min<int64_t>({wanted, ceil_div(shape.pixels, 64), kMostParts}));
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

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

NormWork make_work(const NormShape& shape) {
  return {shape.pixels, static_cast<int32_t>(shape.channels), part_count(shape), 1};
}

LaunchShape finish_shape(const NormShape& shape) {
  return {dim3(static_cast<unsigned>(ceil_div(shape.channels, kFinishChannels))), dim3(kFinishThreads),
          2 * kFinishThreads * sizeof(double)};
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
      status = launch(batch_norm_sums_kernel<T, kSpan>, {grid, kThreads, 2 * kSpan * kThreads * sizeof(float)}, stream,
                      x, shape.feature, partial, shifts, work);
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
                    {grid, kThreads, 0}, stream, static_cast<const T*>(norm.x), shape.feature, shape.place, norm.mean,
                    norm.scales.scale, norm.scales.offset, static_cast<const T*>(norm.add), static_cast<T*>(norm.y),
                    work);
    });
  });
}

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
      cudaError_t status =
          launch(batch_norm_grad_sums_kernel<T, kSpan, kRelu>, {grid, kThreads, 2 * kSpan * kThreads * sizeof(float)},
                 stream, grad, x, shape.feature, shape.place, norm.mean, behind, partial, work);
      if (status != cudaSuccess) return status;
      status = launch(batch_norm_grad_finish_kernel, finish_shape(shape), stream, partial, shape.feature, shape.place,
                      norm.weight, norm.invstd, norm.grad_weight, norm.grad_bias, slopes, norm.training, work);
      if (status != cudaSuccess) return status;
      return launch(batch_norm_grad_apply_kernel<T, kSpan, kRelu>, {grid, kThreads, 0}, stream, grad, x, shape.feature,
                    shape.place, norm.mean, behind, slopes, static_cast<T*>(norm.grad_x), work);
    });
  });
}

}  // namespace prunekernels
