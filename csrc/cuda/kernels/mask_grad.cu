#include "cuda/kernels/mask_grad.h"
#include "cuda/kernels/weight_mask.cuh"

namespace prunekernels {
namespace {

struct MaskGradWork {
  MaskGradLayer layer;
  int32_t team_log;
  int64_t blocks() const { return row_blocks(layer.mask.filters, team_log); }
};

struct NormWork {
  NormLayer layer;
  int32_t team_log;
  int64_t blocks() const { return row_blocks(layer.mask.filters, team_log); }
};

// Masks this thread's spans of one row and adds their part to the three sums.
template <typename T>
PK_DEVICE void mask_row(const MaskGradLayer& layer, const RowTeam& team, float (&sums)[3]) {
  constexpr int kSpan = kSpanOf<T>;
  const int elements = layer.mask.channels * layer.mask.taps;
  const int64_t offset = team.row * elements;
  T* grad = static_cast<T*>(layer.grad) + offset;                                                // [D]
  const T* weight = layer.product_sum ? static_cast<const T*>(layer.weight) + offset : nullptr;  // [D]
  float* accumulated = layer.accumulated ? layer.accumulated + offset : nullptr;                 // [D]
  const float scale = layer.grad_scale ? layer.grad_scale[team.row] : 1.0f;
  const bool row_lives = scale != 0.0f && filter_lives(layer.mask, team.row);
  const bool reads = scale != 1.0f || accumulated || weight || layer.abs_sum || layer.square_sum;
  const int phase = row_phase<kSpan>(grad);
  const bool aligned =
      (!weight || row_phase<kSpan>(weight) == phase) && (!accumulated || row_phase<kSpan>(accumulated) == phase);

  for (int index = team.lane; index < Span<kSpan>::count(phase, elements); index += team.lanes()) {
    const Span<kSpan> span(index, phase, elements);
    const uint32_t live = row_lives ? live_elements(layer.mask, team.row, span) : 0;
    const bool whole = aligned && span.inside == span.kAll;
    const bool writes = live != span.inside || scale != 1.0f;
    float g[kSpan] = {};
    if (live && (reads || writes)) {
      load_span(g, grad, span, live, whole);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) g[i] = to_float(from_float<T>(g[i] * scale));
    }
    if (writes) store_span(g, grad, span, span.inside, whole);
    if (!live) continue;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      sums[0] += fabsf(g[i]);
      sums[1] = fmaf(g[i], g[i], sums[1]);
    }
    if (weight) {
      float w[kSpan];
      load_span(w, weight, span, live, whole);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sums[2] = fmaf(w[i], g[i], sums[2]);
    }
    if (accumulated) {
      float sum[kSpan];
      load_span(sum, accumulated, span, span.inside, whole);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sum[i] += g[i];
      store_span(sum, accumulated, span, span.inside, whole);
    }
  }
}

PK_DEVICE void put_sum(float* sums, int64_t row, float value, bool add) {
  if (sums) sums[row] = add ? sums[row] + value : value;
}

// g[k, c, :] = live(k, c) && scale[k] != 0 ? g * scale[k] : 0. A team of lanes owns a row (a filter), lane l its spans
// l, l + lanes, ...; both ends of a row may be cut spans.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) mask_grad_kernel(const Batch<MaskGradWork> batch, bool add_to_sums) {
  const int item = item_of_block(batch);
  const MaskGradLayer& layer = batch.items[item].layer;
  const RowTeam team(blockIdx.x - batch.first_block[item], batch.items[item].team_log);
  const bool in_range = team.row < layer.mask.filters;
  float sums[3] = {};
  if (in_range) mask_row<T>(layer, team, sums);
  if (!layer.abs_sum && !layer.square_sum && !layer.product_sum) return;
  team_sum(sums, team);
  if (!in_range || team.lane != 0) return;
  put_sum(layer.abs_sum, team.row, sums[0], add_to_sums);
  put_sum(layer.square_sum, team.row, sums[1], add_to_sums);
  put_sum(layer.product_sum, team.row, sums[2], add_to_sums);
}

// abs_sum[k] = sum |w[k]|, square_sum[k] = sum w[k]^2 over live weights. Rows and teams as in mask_grad_kernel.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) filter_norms_kernel(const Batch<NormWork> batch) {
  constexpr int kSpan = kSpanOf<T>;
  const int item = item_of_block(batch);
  const NormLayer& layer = batch.items[item].layer;
  const RowTeam team(blockIdx.x - batch.first_block[item], batch.items[item].team_log);
  const bool in_range = team.row < layer.mask.filters;
  float sums[2] = {};
  if (in_range && filter_lives(layer.mask, team.row)) {
    const int elements = layer.mask.channels * layer.mask.taps;
    const T* weight = static_cast<const T*>(layer.weight) + team.row * elements;  // [D]
    const int phase = row_phase<kSpan>(weight);
    for (int index = team.lane; index < Span<kSpan>::count(phase, elements); index += team.lanes()) {
      const Span<kSpan> span(index, phase, elements);
      const uint32_t live = live_elements(layer.mask, team.row, span);
      if (!live) continue;
      float w[kSpan];
      load_span(w, weight, span, live, span.inside == span.kAll);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        sums[0] += fabsf(w[i]);
        sums[1] = fmaf(w[i], w[i], sums[1]);
      }
    }
  }
  team_sum(sums, team);
  if (!in_range || team.lane != 0) return;
  put_sum(layer.abs_sum, team.row, sums[0], false);
  put_sum(layer.square_sum, team.row, sums[1], false);
}

struct KernelNormWork {
  NormLayer layer;
  int64_t blocks() const { return row_blocks(static_cast<int64_t>(layer.mask.filters) * layer.mask.channels, 0); }
};

// The same sums for each kernel: [K, channels]. A thread owns a kernel; neighbouring threads read neighbouring kernels.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) kernel_norms_kernel(const Batch<KernelNormWork> batch) {
  const int item = item_of_block(batch);
  const NormLayer& layer = batch.items[item].layer;
  const int channels = layer.mask.channels, taps = layer.mask.taps;
  const uint32_t pair = (blockIdx.x - batch.first_block[item]) * kRowThreads + threadIdx.x;
  const int64_t filter = pair / channels;
  const int channel = pair % channels;
  if (filter >= layer.mask.filters) return;
  const uint32_t* pairs = layer.mask.pairs;
  const bool lives = filter_lives(layer.mask, filter) &&
                     (!pairs || (pairs[filter * ((channels + 31) / 32) + (channel >> 5)] >> (channel & 31) & 1));
  float sums[2] = {};
  if (lives) {
    const T* weight = static_cast<const T*>(layer.weight) + filter * channels * taps;  // [D]
    const int first = layer.mask.channels_last ? channel : channel * taps;
    const int stride = layer.mask.channels_last ? channels : 1;
    for (int tap = 0; tap < taps; ++tap) {
      const float w = to_float(weight[first + tap * stride]);
      sums[0] += fabsf(w);
      sums[1] = fmaf(w, w, sums[1]);
    }
  }
  put_sum(layer.abs_sum, pair, sums[0], false);
  put_sum(layer.square_sum, pair, sums[1], false);
}

// The kernels hold offsets within a row, and indices of (filter, channel) pairs, in 32 bits.
bool too_large(const WeightMask& mask) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - kRowThreads * 8;
  const int64_t channels = mask.channels;
  return channels * mask.taps > kLimit || channels * mask.filters > kLimit;
}

template <typename Work, typename Layer>
Work plan_rows(const Layer& layer, int span) {
  const int64_t elements = static_cast<int64_t>(layer.mask.channels) * layer.mask.taps;
  return {layer, team_log((elements + span - 1) / span)};
}

template <typename Layer>
bool any_too_large(const Layer* layers, int64_t count) {
  return std::any_of(layers, layers + count, [](const Layer& layer) { return too_large(layer.mask); });
}

template <typename T>
cudaError_t mask_grad_of(const MaskGradLayer* layers, int64_t count, bool add_to_sums, cudaStream_t stream) {
  return launch_in_batches<MaskGradWork>(
      count, [&](int64_t i) { return plan_rows<MaskGradWork>(layers[i], kSpanOf<T>); },
      [&](const Batch<MaskGradWork>& batch, unsigned grid) {
        return launch(mask_grad_kernel<T>, {grid, kRowThreads, kTeamSumBytes}, stream, batch, add_to_sums);
      });
}

template <typename T>
cudaError_t filter_norms_of(const NormLayer* layers, int64_t count, cudaStream_t stream) {
  return launch_in_batches<NormWork>(
      count, [&](int64_t i) { return plan_rows<NormWork>(layers[i], kSpanOf<T>); },
      [&](const Batch<NormWork>& batch, unsigned grid) {
        return launch(filter_norms_kernel<T>, {grid, kRowThreads, kTeamSumBytes}, stream, batch);
      });
}

template <typename T>
cudaError_t kernel_norms_of(const NormLayer* layers, int64_t count, cudaStream_t stream) {
  return launch_in_batches<KernelNormWork>(
      count, [&](int64_t i) { return KernelNormWork{layers[i]}; },
      [&](const Batch<KernelNormWork>& batch, unsigned grid) {
        return launch(kernel_norms_kernel<T>, {grid, kRowThreads, 0}, stream, batch);
      });
}

}  // namespace

cudaError_t launch_mask_grad(Element element, const MaskGradLayer* layers, int64_t count, bool add_to_sums,
                             cudaStream_t stream) {
  if (any_too_large(layers, count)) return cudaErrorInvalidValue;
  return with_element(element,
                      [&](auto zero) { return mask_grad_of<decltype(zero)>(layers, count, add_to_sums, stream); });
}

cudaError_t launch_filter_norms(Element element, const NormLayer* layers, int64_t count, cudaStream_t stream) {
  if (any_too_large(layers, count)) return cudaErrorInvalidValue;
  return with_element(element, [&](auto zero) { return filter_norms_of<decltype(zero)>(layers, count, stream); });
}

cudaError_t launch_kernel_norms(Element element, const NormLayer* layers, int64_t count, cudaStream_t stream) {
  if (any_too_large(layers, count)) return cudaErrorInvalidValue;
  return with_element(element, [&](auto zero) { return kernel_norms_of<decltype(zero)>(layers, count, stream); });
}

}  // namespace prunekernels
