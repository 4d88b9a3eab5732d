#include "cuda/kernels/cluster_mean.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {
namespace {

struct ClusterWork {
  ClusterLayer layer;
  uint32_t spans;  // of a row
  bool whole;      // rows are whole, aligned spans; else a span is one element
  int64_t blocks() const { return (layer.clusters * spans + kRowThreads - 1) / kRowThreads; }
};

template <typename T, int kSpan>
struct ClusterSpan {
  const int32_t* members;  // [count]
  int count;
  int64_t elements;
  int first;  // element of the row

  // sum[i] = mean over the members of element first + i.
  PK_DEVICE void mean_of(float (&sum)[kSpan], const T* rows) const {  // rows: [.., elements]
#pragma unroll
    for (int i = 0; i < kSpan; ++i) sum[i] = 0.0f;
#pragma unroll 4
    for (int m = 0; m < count; ++m) {
      float value[kSpan];
      load(value, rows, m);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sum[i] += value[i];
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) sum[i] /= static_cast<float>(count);
  }
  PK_DEVICE void load(float (&value)[kSpan], const T* rows, int m) const {
    const Span<kSpan> span(0, 0, kSpan);
    load_span(value, rows + members[m] * elements + first, span, span.kAll, true);
  }
  PK_DEVICE void store(const float (&value)[kSpan], T* rows, int m) const {
    const Span<kSpan> span(0, 0, kSpan);
    store_span(value, rows + members[m] * elements + first, span, span.kAll, true);
  }
};

template <typename T, int kSpan>
PK_DEVICE void average_span(const ClusterLayer& layer, uint32_t cluster, uint32_t span, float strength) {
  T* grad = static_cast<T*>(layer.grad);                  // [rows, elements]
  const T* weight = static_cast<const T*>(layer.weight);  // [rows, elements]
  const int32_t begin = layer.first[cluster];
  const ClusterSpan<T, kSpan> rows{layer.members + begin, layer.first[cluster + 1] - begin, layer.elements,
                                   static_cast<int>(span) * kSpan};
  float mean[kSpan];
  rows.mean_of(mean, grad);
  if (!weight) {
#pragma unroll 4
    for (int m = 0; m < rows.count; ++m) rows.store(mean, grad, m);
    return;
  }
  float middle[kSpan];
  rows.mean_of(middle, weight);
#pragma unroll 2
  for (int m = 0; m < rows.count; ++m) {
    float value[kSpan];
    rows.load(value, weight, m);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) value[i] = fmaf(strength, value[i] - middle[i], mean[i]);
    rows.store(value, grad, m);
  }
}

// A thread owns one span in all rows of a cluster; neighbouring threads have neighbouring spans.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) cluster_mean_kernel(const Batch<ClusterWork> batch, float strength) {
  const int item = item_of_block(batch);
  const ClusterWork& work = batch.items[item];
  const uint32_t unit = (blockIdx.x - batch.first_block[item]) * kRowThreads + threadIdx.x;
  const uint32_t cluster = unit / work.spans, span = unit - cluster * work.spans;
  if (cluster >= work.layer.clusters) return;
  if (work.whole)
    average_span<T, kSpanOf<T>>(work.layer, cluster, span, strength);
  else
    average_span<T, 1>(work.layer, cluster, span, strength);
}

ClusterWork plan_layer(const ClusterLayer& layer, int span) {
  const auto aligned = [](const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; };
  const bool whole = layer.elements % span == 0 && aligned(layer.grad) && aligned(layer.weight);
  return {layer, static_cast<uint32_t>(whole ? layer.elements / span : layer.elements), whole};
}

template <typename T>
cudaError_t cluster_mean_of(const ClusterLayer* layers, int64_t count, float strength, cudaStream_t stream) {
  return launch_in_batches<ClusterWork>(
      count, [&](int64_t i) { return plan_layer(layers[i], kSpanOf<T>); },
      [&](const Batch<ClusterWork>& batch, unsigned grid) {
        return launch(cluster_mean_kernel<T>, {grid, kRowThreads, 0}, stream, batch, strength);
      });
}

}  // namespace

cudaError_t launch_cluster_mean(Element element, const ClusterLayer* layers, int64_t count, float strength,
                                cudaStream_t stream) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - kRowThreads;  // numbers of spans are 32-bit
  for (int64_t i = 0; i < count; ++i)
    if (layers[i].clusters * layers[i].elements > kLimit) return cudaErrorInvalidValue;
  return with_element(element,
                      [&](auto zero) { return cluster_mean_of<decltype(zero)>(layers, count, strength, stream); });
}

}  // namespace prunekernels
