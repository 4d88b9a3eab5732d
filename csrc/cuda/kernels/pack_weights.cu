#include "cuda/kernels/pack_weights.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {
namespace {

constexpr int kPackThreadsLog = 8, kPackThreads = 1 << kPackThreadsLog, kPackLines = kPackThreads / kWarp;
constexpr int kUnpackSpan = 4;

struct Tf32 {};  // stored as float, rounded to tf32
template <typename T>
struct PackedAs {
  using type = T;
  PK_DEVICE static T from(float value) { return from_float<T>(value); }
};
template <>
struct PackedAs<Tf32> {
  using type = float;
  PK_DEVICE static float from(float value) { return __uint_as_float(round_to_tf32(value)); }
};

PK_DEVICE float load_as_float(const void* data, Element element, int64_t i) {
  switch (element) {
    case Element::bf16:
      return to_float(static_cast<const BFloat16*>(data)[i]);
    case Element::f16:
      return to_float(static_cast<const Half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// The parts of a mask table on the device.
struct Lists {
  const int32_t *out_index, *out_slot, *in_index, *in_slot;
  const uint32_t* pairs;
  int words;

  PK_DEVICE explicit Lists(const PackMask& mask) {
    out_index = mask.words + kHeaderWords, out_slot = out_index + mask.filters, in_index = out_slot + mask.filters;
    in_slot = in_index + mask.channels_per_group * mask.groups;
    pairs = reinterpret_cast<const uint32_t*>(in_slot + mask.channels_per_group * mask.groups);
    words = (mask.channels_per_group + 31) / 32;
  }
  PK_DEVICE bool pair(int filter, int channel_in_group) const {
    return pairs[static_cast<int64_t>(filter) * words + (channel_in_group >> 5)] >> (channel_in_group & 31) & 1;
  }
};

// ---- pack

struct PackWork {
  PackJob job;
  int32_t rows, inner_blocks, outer_blocks;
  int64_t blocks() const { return static_cast<int64_t>(inner_blocks) * outer_blocks; }
};

// Offset in the full weight of the kernel that goes to packed (row, column); -1: zeros go there.
PK_DEVICE int64_t full_kernel(const PackJob& job, int row, int column) {
  const PackMask& mask = job.mask;
  const int group = row / job.rows_per_group, within = row - group * job.rows_per_group;
  if (within >= mask.out_per_group || column >= mask.in_per_group) return -1;
  const Lists lists(mask);
  const int filter = lists.out_index[group * mask.out_per_group + within];
  const int channel = lists.in_index[group * mask.in_per_group + column];
  if (filter < 0 || channel < 0) return -1;
  const int in_group = mask.groups == 1 ? channel : channel % mask.channels_per_group;
  return lists.pair(filter, in_group) ? filter * job.strides.row + in_group * job.strides.channel : -1;
}

// packed[i, t, j] = full[out_index[i], in_index[j], t], dead kernels and padding 0. A thread owns one kernel: lanes lie
// along the innermost packed axis (columns, or rows in PackLayout::columns), warps along the other.
template <typename Packed>
__global__ void __launch_bounds__(kPackThreads) pack_weights_kernel(const Batch<PackWork> batch) {
  using As = PackedAs<Packed>;
  const int item = item_of_block(batch);
  const PackWork& work = batch.items[item];
  const PackJob& job = work.job;
  const int block = blockIdx.x - batch.first_block[item];
  const int inner = block % work.inner_blocks * kWarp + threadIdx.x % kWarp;
  const int outer = block / work.inner_blocks * kPackLines + threadIdx.x / kWarp;
  const bool transposed = job.layout == PackLayout::columns;
  const int row = transposed ? inner : outer, column = transposed ? outer : inner;
  if (row >= work.rows || column >= job.columns) return;

  const int64_t from = full_kernel(job, row, column);
  int64_t to = (static_cast<int64_t>(row) * job.taps) * job.columns + column, step = job.columns;
  if (transposed) to = (static_cast<int64_t>(column) * job.taps) * work.rows + row, step = work.rows;
  if (job.layout == PackLayout::channels) to = (static_cast<int64_t>(row) * job.columns + column) * job.taps, step = 1;
  auto* packed = static_cast<typename As::type*>(job.packed) + to;
  for (int tap = 0; tap < job.taps; ++tap) {
    const float value = from < 0 ? 0.0f : load_as_float(job.full, job.full_element, from + tap * job.strides.tap);
    packed[tap * step] = As::from(value);
  }
}

bool fits(int64_t elements) { return elements <= INT32_MAX; }

template <typename Packed>
cudaError_t pack(const PackJob* jobs, int64_t count, cudaStream_t stream) {
  const auto plan = [&](int64_t i) {
    PackWork work{jobs[i], jobs[i].mask.live_groups * jobs[i].rows_per_group, 0, 0};
    const bool transposed = jobs[i].layout == PackLayout::columns;
    const int32_t inner = transposed ? work.rows : jobs[i].columns, outer = transposed ? jobs[i].columns : work.rows;
    work.inner_blocks = (inner + kWarp - 1) / kWarp, work.outer_blocks = (outer + kPackLines - 1) / kPackLines;
    return work;
  };
  return launch_in_batches<PackWork>(count, plan, [&](const Batch<PackWork>& batch, unsigned grid) {
    return launch(pack_weights_kernel<Packed>, {dim3(grid), dim3(kPackThreads), 0}, stream, batch);
  });
}

// ---- unpack

constexpr int kUnpackBlocks = 4;    // at least so many on a multiprocessor
constexpr int kSlicesInFlight = 4;  // of kUnpackSpan elements each
constexpr int kMaxPartsLog = 3;     // a part is a range of slices; as many warps take one as there are lines for

struct UnpackWork {
  UnpackJob job;
  int32_t elements;    // of the full weight
  int32_t parts_log;   // log2 of the parts that the slices are cut into
  bool channels_last;  // the order in which it is walked: that of its memory
  bool whole_spans;    // dense and aligned
  int32_t block_elements() const { return (kPackThreads * kUnpackSpan) >> parts_log; }
  int64_t blocks() const { return (elements + block_elements() - 1) / block_elements(); }
};

// Where full (filter, channel in its group, tap) lies in a slice; -1: its gradient is 0, and nothing is read.
PK_DEVICE int64_t packed_place(const UnpackJob& job, const Lists& lists, int filter, int channel, int tap) {
  const PackMask& mask = job.mask;
  const int slot = lists.out_slot[filter];
  if (slot < 0 || (job.grad_scale && job.grad_scale[filter] == 0.0f) || !lists.pair(filter, channel)) return -1;
  int row = slot, column = channel;
  if (mask.groups == 1) {
    column = lists.in_slot[channel];
  } else {
    const int group = slot / mask.out_per_group,
              first = filter / (mask.filters / mask.groups) * mask.channels_per_group;
    row = slot + group * (job.rows_per_group - mask.out_per_group);
    column = lists.in_slot[first + channel] - group * mask.in_per_group;
  }
  return job.layout == PackLayout::channels ? (static_cast<int64_t>(row) * job.columns + column) * job.taps + tap
                                            : (static_cast<int64_t>(row) * job.taps + tap) * job.columns + column;
}

using SpanSums = Vector<float, kUnpackSpan>;

// sums[i] += packed[slice, at[i]] for kCount slices, in order; all are loaded before the first is added.
template <int kCount, typename P>
PK_DEVICE void add_slices(const P* (&from)[kUnpackSpan], const bool (&live)[kUnpackSpan], int64_t slice,
                          SpanSums& sums) {
  float values[kCount][kUnpackSpan];
#pragma unroll
  for (int s = 0; s < kCount; ++s)
#pragma unroll
    for (int i = 0; i < kUnpackSpan; ++i) {
      values[s][i] = live[i] ? to_float(*from[i]) : 0.0f;
      from[i] += slice;
    }
#pragma unroll
  for (int s = 0; s < kCount; ++s)
#pragma unroll
    for (int i = 0; i < kUnpackSpan; ++i) sums.lanes[i] += values[s][i];
}

template <typename P>
PK_DEVICE SpanSums sum_slices(const UnpackJob& job, const int64_t (&at)[kUnpackSpan], int begin, int end) {
  const P* from[kUnpackSpan];
  bool live[kUnpackSpan];
#pragma unroll
  for (int i = 0; i < kUnpackSpan; ++i)
    live[i] = at[i] >= 0, from[i] = static_cast<const P*>(job.packed) + (live[i] ? begin * job.slice + at[i] : 0);
  SpanSums sums{};
  int left = end - begin;
#pragma unroll 1
  for (; left >= kSlicesInFlight; left -= kSlicesInFlight) add_slices<kSlicesInFlight>(from, live, job.slice, sums);
#pragma unroll 1
  for (; left > 0; --left) add_slices<1>(from, live, job.slice, sums);
  return sums;
}

// Adds the sums of a span's parts, in the order of the parts, where the thread of the first part gets them. Every
// thread must call it.
PK_DEVICE void add_parts(int part, int parts_log, SpanSums& sums) {
  if (parts_log == 0) return;
  const Shared<SpanSums> others(0);  // [threads]
  if (part > 0) others.set(threadIdx.x, sums);
  __syncthreads();
  if (part > 0) return;
  for (int other = 1; other < 1 << parts_log; ++other) {
    const SpanSums more = others.get(threadIdx.x + (other << (kPackThreadsLog - parts_log)));
#pragma unroll
    for (int i = 0; i < kUnpackSpan; ++i) sums.lanes[i] += more.lanes[i];
  }
}

// full[k, c, t] = scale[k] * sum over slices of packed[out_slot[k], t, in_slot[c]], dead 0. A thread owns kUnpackSpan
// neighbours in memory (the last one may have fewer) and one part of the slices. Warps lie along the elements first, so
// that lanes share sectors of a slice.
template <typename T>
__global__ void __launch_bounds__(kPackThreads, kUnpackBlocks)
    unpack_grad_weight_kernel(const Batch<UnpackWork> batch) {
  const int item = item_of_block(batch);
  const UnpackWork& work = batch.items[item];
  const UnpackJob& job = work.job;
  const int spans_log = kPackThreadsLog - work.parts_log;
  const int part = threadIdx.x >> spans_log, block = blockIdx.x - batch.first_block[item];
  const int first = ((block << spans_log) + (threadIdx.x & ((1 << spans_log) - 1))) * kUnpackSpan;
  const Lists lists(job.mask);
  const int channels = job.mask.channels_per_group, row_elements = channels * job.taps;
  const int inner_count = work.channels_last ? channels : job.taps;
  int filter = first / row_elements, outer = first % row_elements / inner_count, inner = first % inner_count;
  int64_t at[kUnpackSpan], to[kUnpackSpan];
  float scale[kUnpackSpan];
#pragma unroll
  for (int i = 0; i < kUnpackSpan; ++i) {
    at[i] = -1, to[i] = -1, scale[i] = 0;
    if (first + i >= work.elements) continue;
    const int channel = work.channels_last ? inner : outer, tap = work.channels_last ? outer : inner;
    at[i] = packed_place(job, lists, filter, channel, tap);
    scale[i] = at[i] < 0 || !job.grad_scale ? 1.0f : job.grad_scale[filter];
    to[i] = filter * job.strides.row + channel * job.strides.channel + tap * job.strides.tap;
    if (++inner < inner_count) continue;
    inner = 0;
    if (++outer == row_elements / inner_count) outer = 0, ++filter;
  }

  const int begin = static_cast<int>(static_cast<int64_t>(job.splits) * part >> work.parts_log);
  const int end = static_cast<int>(static_cast<int64_t>(job.splits) * (part + 1) >> work.parts_log);
  SpanSums sums;
  switch (job.packed_element) {
    case Element::bf16:
      sums = sum_slices<BFloat16>(job, at, begin, end);
      break;
    case Element::f16:
      sums = sum_slices<Half>(job, at, begin, end);
      break;
    default:
      sums = sum_slices<float>(job, at, begin, end);
  }
  add_parts(part, work.parts_log, sums);
  if (part > 0 || first >= work.elements) return;

  Vector<T, kUnpackSpan> vector;
#pragma unroll
  for (int i = 0; i < kUnpackSpan; ++i) vector.lanes[i] = from_float<T>(at[i] < 0 ? 0.0f : sums.lanes[i] * scale[i]);
  if (work.whole_spans) {
    *reinterpret_cast<Vector<T, kUnpackSpan>*>(static_cast<T*>(job.full) + first) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnpackSpan; ++i)
    if (to[i] >= 0) static_cast<T*>(job.full)[to[i]] = vector.lanes[i];
}

// So many parts that each has two rounds of slices or more.
int32_t parts_log_of(int64_t splits) {
  int32_t log = 0;
  while (log < kMaxPartsLog && splits >> log > 2 * kSlicesInFlight) ++log;
  return log;
}

template <typename T>
cudaError_t unpack(const UnpackJob* jobs, int64_t count, cudaStream_t stream) {
  const auto plan = [&](int64_t i) {
    const UnpackJob& job = jobs[i];
    const WeightStrides& s = job.strides;
    const int64_t channels = job.mask.channels_per_group, row = channels * job.taps, elements = job.mask.filters * row;
    const bool channels_last = s.tap != 1 || (s.channel == 1 && job.taps != 1);
    const bool dense = s.row == row && (channels_last ? s.channel == 1 && s.tap == channels : s.channel == job.taps);
    const bool aligned = reinterpret_cast<uintptr_t>(job.full) % sizeof(Vector<T, kUnpackSpan>) == 0;
    return UnpackWork{job, static_cast<int32_t>(elements), parts_log_of(job.splits), channels_last,
                      dense && aligned && elements % kUnpackSpan == 0};
  };
  return launch_in_batches<UnpackWork>(count, plan, [&](const Batch<UnpackWork>& batch, unsigned grid) {
    return launch(unpack_grad_weight_kernel<T>, {dim3(grid), dim3(kPackThreads), kPackThreads * sizeof(SpanSums)},
                  stream, batch);
  });
}

}  // namespace

PackMask pack_mask(const int32_t* host_words, const int32_t* device_words) {
  const MaskTable table(host_words);
  const auto word = [&](TableWord w) { return static_cast<int32_t>(table[w]); };
  return {device_words,
          static_cast<int32_t>(table[kFilters]),
          static_cast<int32_t>(table.channels_per_group()),
          word(kGroups),
          word(kLiveGroups),
          word(kOutPerGroup),
          word(kInPerGroup)};
}

cudaError_t launch_pack_weights(const PackJob* jobs, int64_t count, Element packed, bool tf32, cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    const PackMask& mask = jobs[i].mask;
    const int64_t rows = static_cast<int64_t>(mask.live_groups) * jobs[i].rows_per_group;
    if (jobs[i].rows_per_group < mask.out_per_group || jobs[i].columns < mask.in_per_group || !fits(rows) ||
        (jobs[i].layout == PackLayout::columns && mask.live_groups > 1))
      return cudaErrorInvalidValue;
  }
  if (tf32 && packed == Element::f32) return pack<Tf32>(jobs, count, stream);
  return with_element(packed, [&](auto zero) { return pack<decltype(zero)>(jobs, count, stream); });
}

cudaError_t launch_unpack_grad_weight(const UnpackJob* jobs, int64_t count, Element full, cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    const PackMask& mask = jobs[i].mask;
    if (jobs[i].rows_per_group < mask.out_per_group || jobs[i].columns < mask.in_per_group ||
        jobs[i].layout == PackLayout::columns ||
        !fits(static_cast<int64_t>(mask.filters) * mask.channels_per_group * jobs[i].taps + kPackThreads * kUnpackSpan))
      return cudaErrorInvalidValue;
  }
  return with_element(full, [&](auto zero) { return unpack<decltype(zero)>(jobs, count, stream); });
}

}  // namespace prunekernels
