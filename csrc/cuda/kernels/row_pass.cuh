// One pass over the rows of many matrices in one launch, as mask_grad, filter_norms and the optimizer steps make it.
//   Batch     the descriptors of one launch, as many as kernel parameters hold; each has a stretch of the grid
//   RowTeam   the threads that share a row: 1, 2, 4 ... 32 lanes of a warp, or the whole block for a long row
//   Span      kSpan neighbouring elements of a row, loaded and stored in 16-byte accesses where all are in the row
// Sums over a row are formed in an order that depends on the row's length and alignment alone.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/kernels/ptx.cuh"

namespace prunekernels {

constexpr int kRowThreads = 256;
constexpr int kRowThreadsLog = 8;
constexpr int kWarpLog = 5;

// ---- many matrices, one launch

constexpr size_t kParameterBytes = 4096 - 128;  // the rest is for the kernel's other parameters
// What CUDA 12.1 and later take. Every launch copies all of them, so they are for batches that need the room.
constexpr size_t kManyParameterBytes = 32764 - 128;
#if defined(PK_EMULATED)
constexpr bool kTakesManyParameters = true;
#else
constexpr bool kTakesManyParameters = CUDART_VERSION >= 12010;
#endif

template <typename Item, size_t kBytes = kParameterBytes>
struct Batch {
  static constexpr int kRoom = (kBytes - 8) / (sizeof(Item) + sizeof(uint32_t));
  int32_t count;
  uint32_t first_block[kRoom];
  Item items[kRoom];
};

// The item that this block belongs to: the last one that begins at or before it.
template <typename Item, size_t kBytes>
PK_DEVICE int item_of_block(const Batch<Item, kBytes>& batch) {
  int item = 0;
  for (int end = batch.count; end - item > 1;) {
    const int middle = (item + end) / 2;
    if (batch.first_block[middle] <= blockIdx.x)
      item = middle;
    else
      end = middle;
  }
  return item;
}

// Launches items 0..count - 1 in as few batches as possible. plan(i) makes item i; its method blocks() says how many
// blocks it needs (0: it is left out). run(batch, grid) launches a batch.
template <typename Item, size_t kBytes = kParameterBytes, typename Plan, typename Run>
cudaError_t launch_in_batches(int64_t count, Plan plan, Run run) {
  constexpr int64_t kMaxGrid = std::numeric_limits<int32_t>::max();
  Batch<Item, kBytes> batch;
  batch.count = 0;
  int64_t grid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Item item = plan(i);
    const int64_t blocks = item.blocks();
    if (blocks > kMaxGrid) return cudaErrorInvalidValue;
    if (blocks == 0) continue;
    if (batch.count == Batch<Item, kBytes>::kRoom || grid + blocks > kMaxGrid) {
      const cudaError_t status = run(batch, static_cast<unsigned>(grid));
      if (status != cudaSuccess) return status;
      batch.count = 0;
      grid = 0;
    }
    batch.first_block[batch.count] = static_cast<uint32_t>(grid);
    batch.items[batch.count++] = item;
    grid += blocks;
  }
  return batch.count == 0 ? cudaSuccess : run(batch, static_cast<unsigned>(grid));
}

// ---- rows and the threads that share them

// log2 of the threads that share a row of that many spans: one span a thread up to a warp, a whole block where a warp
// would have more than 8 spans a thread.
inline int32_t team_log(int64_t spans) {
  if (spans > 8 << kWarpLog) return kRowThreadsLog;
  int32_t log = 0;
  while (log < kWarpLog && (1 << log) < spans) ++log;
  return log;
}

inline int64_t row_blocks(int64_t rows, int32_t team_log) {
  const int64_t rows_per_block = kRowThreads >> team_log;
  return (rows + rows_per_block - 1) / rows_per_block;
}

struct RowTeam {
  int64_t row;
  int lane, log;

  PK_DEVICE RowTeam(uint32_t block, int team_log)
      : row((static_cast<int64_t>(block) << (kRowThreadsLog - team_log)) + (threadIdx.x >> team_log)),
        lane(threadIdx.x & ((1 << team_log) - 1)),
        log(team_log) {}
  PK_DEVICE int lanes() const { return 1 << log; }
};

constexpr size_t kTeamSumBytes = 3 * sizeof(float) * kRowThreads / kWarp;

// Sums over the team; lane 0 receives them. Every thread of the block must call it, once.
template <int kCount>
PK_DEVICE void team_sum(float (&sum)[kCount], const RowTeam& team) {
  static_assert(kCount <= 3, "kTeamSumBytes");
  const bool whole_block = team.log == kRowThreadsLog;
  for (int distance = whole_block ? kWarp / 2 : team.lanes() / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
  if (!whole_block) return;
  const Shared<float> partial(0);  // [warps, kCount]
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial.set(threadIdx.x / kWarp * kCount + i, sum[i]);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kRowThreads / kWarp; ++warp)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += partial.get(warp * kCount + i);
}

// ---- spans

template <typename T>
constexpr int kSpanOf = 16 / sizeof(T);

// How many elements the row begins behind a span's start: spans start at addresses that are multiples of kSpan
// elements, so a row's first and last span may be cut.
template <int kSpan, typename T>
PK_DEVICE int row_phase(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kSpan);
}

template <int kSpan>
struct Span {
  static constexpr uint32_t kAll = (1u << kSpan) - 1;
  int first;        // element of the row; < 0 where the span begins before the row
  uint32_t inside;  // bit i: element first + i lies in the row

  PK_DEVICE Span(int index, int phase, int row_elements) : first(index * kSpan - phase), inside(kAll) {
    if (first < 0) inside &= kAll << -first;
    if (row_elements - first < kSpan) inside &= (1u << (row_elements - first)) - 1;
  }
  PK_DEVICE static int count(int phase, int row_elements) { return (phase + row_elements + kSpan - 1) / kSpan; }
};

template <typename T, int kSpan>
struct alignas(sizeof(T) * kSpan < 16 ? sizeof(T) * kSpan : 16) Vector {
  T lanes[kSpan];
};

// value[i] = bit i of wanted ? row[first + i] : 0. `whole`: the span is all in the row and aligned, and is read in one
// access; else only wanted elements are read.
template <int kSpan, typename T>
PK_DEVICE void load_span(float (&value)[kSpan], const T* row, const Span<kSpan>& span, uint32_t wanted, bool whole) {
  if (whole) {
    const auto vector = *reinterpret_cast<const Vector<T, kSpan>*>(row + span.first);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) value[i] = wanted >> i & 1 ? to_float(vector.lanes[i]) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) value[i] = wanted >> i & 1 ? to_float(row[span.first + i]) : 0.0f;
  }
}

// row[first + i] = value[i] for the wanted elements; for all of them, in one access, where `whole`.
template <int kSpan, typename T>
PK_DEVICE void store_span(const float (&value)[kSpan], T* row, const Span<kSpan>& span, uint32_t wanted, bool whole) {
  if (whole) {
    Vector<T, kSpan> vector;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) vector.lanes[i] = from_float<T>(value[i]);
    *reinterpret_cast<Vector<T, kSpan>*>(row + span.first) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < kSpan; ++i)
      if (wanted >> i & 1) row[span.first + i] = from_float<T>(value[i]);
  }
}

}  // namespace prunekernels
