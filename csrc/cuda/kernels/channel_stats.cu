#include "cuda/kernels/channel_stats.h"
#include "cuda/kernels/row_pass.cuh"

namespace prunekernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostParts = 512;
constexpr int kPiece = 4096;  // NCHW: a plane is summed in pieces of this many pixels
constexpr int kFinishChannels = 32, kFinishRows = 16, kFinishThreads = kFinishChannels * kFinishRows;

struct Work {
  int64_t N, C, pixels;
  int32_t parts;
  int32_t lanes;  // NHWC: threads side by side over channels; NCHW: of a warp over one piece. A power of two
  bool relu;
};

// Keeps NaN.
PK_DEVICE float activated(float value, bool relu) { return relu && value < 0.0f ? 0.0f : value; }

// partial[part, c] = sum over the part's pixels. A block owns lanes * kSpan channels and a stretch of pixels; thread
// (lane, row) sums every rows-th pixel for its kSpan channels. kSpan > 1 needs C % kSpan == 0 and an aligned x.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kThreads) channel_stats_nhwc_kernel(const T* x,      // [N * pixels, C]
                                                                      float* partial,  // [parts, C]
                                                                      Work work) {
  const int lane = threadIdx.x % work.lanes, row = threadIdx.x / work.lanes, rows = kThreads / work.lanes;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * work.lanes + lane) * kSpan;
  const int64_t total = work.N * work.pixels, share = (total + work.parts - 1) / work.parts;
  const int64_t begin = blockIdx.y * share, end = begin + share < total ? begin + share : total;
  float sum[kSpan] = {};
  if (channel < work.C) {
    const Span<kSpan> span(0, 0, kSpan);
#pragma unroll 4
    for (int64_t pixel = begin + row; pixel < end; pixel += rows) {
      float value[kSpan];
      load_span(value, x + pixel * work.C + channel, span, span.kAll, true);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sum[i] += activated(value[i], work.relu);
    }
  }

  const Shared<float> shared(0);  // [kSpan, kThreads]; the upper half of the rows writes
  for (int half = rows / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half)
#pragma unroll
      for (int i = 0; i < kSpan; ++i) shared.set(threadIdx.x + i * kThreads, sum[i]);
    __syncthreads();
    if (row < half)
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sum[i] += shared.get(threadIdx.x + half * work.lanes + i * kThreads);
  }
  if (row != 0 || channel >= work.C) return;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) partial[blockIdx.y * work.C + channel + i] = sum[i];
}

// The same for NCHW. A warp owns a channel and a part of the N * pieces pieces of its planes. `lanes` lanes share a
// piece, so a warp sums several small planes at once. Both ends of a piece may be cut spans.
template <typename T>
__global__ void __launch_bounds__(kThreads) channel_stats_nchw_kernel(const T* x,      // [N, C, pixels]
                                                                      float* partial,  // [parts, C]
                                                                      Work work) {
  constexpr int kSpan = 16 / sizeof(T);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (channel >= work.C) return;
  const int lane = threadIdx.x % work.lanes, team = threadIdx.x % kWarp / work.lanes, teams = kWarp / work.lanes;
  const int64_t pieces = (work.pixels + kPiece - 1) / kPiece, total = work.N * pieces;
  const int64_t share = (total + work.parts - 1) / work.parts;
  const int64_t begin = blockIdx.y * share, end = begin + share < total ? begin + share : total;
  float sum = 0.0f;
  for (int64_t unit = begin + team; unit < end; unit += teams) {
    const int64_t n = unit / pieces, first = (unit - n * pieces) * kPiece;
    const T* piece = x + (n * work.C + channel) * work.pixels + first;  // [pixels]
    const int pixels = static_cast<int>(work.pixels - first < kPiece ? work.pixels - first : kPiece);
    const int phase = row_phase<kSpan>(piece);
    for (int index = lane; index < Span<kSpan>::count(phase, pixels); index += work.lanes) {
      const Span<kSpan> span(index, phase, pixels);
      float value[kSpan];
      load_span(value, piece, span, span.inside, span.inside == span.kAll);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) sum += activated(value[i], work.relu);
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarp == 0) partial[blockIdx.y * work.C + channel] = sum;
}

// mean[c] = sum over parts of partial[part, c] / (N * pixels). Thread (c, row) adds every kFinishRows-th part.
__global__ void __launch_bounds__(kFinishThreads) channel_stats_finish_kernel(const float* partial,  // [parts, C]
                                                                              float* mean,           // [C]
                                                                              Work work) {
  const int lane = threadIdx.x % kFinishChannels, row = threadIdx.x / kFinishChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinishChannels + lane;
  float sum = 0.0f;
  if (channel < work.C)
#pragma unroll 8
    for (int part = row; part < work.parts; part += kFinishRows) sum += partial[part * work.C + channel];
  const Shared<float> shared(0);  // [kFinishRows, kFinishChannels]
  shared.set(threadIdx.x, sum);
  __syncthreads();
  if (row != 0 || channel >= work.C) return;
  for (int other = 1; other < kFinishRows; ++other) sum += shared.get(other * kFinishChannels + lane);
  const int64_t count = work.N * work.pixels;
  mean[channel] = count == 0 ? 0.0f : sum / static_cast<float>(count);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t lanes_for(int64_t spans) {
  int32_t lanes = 1;
  while (lanes < kWarp && lanes < spans) lanes *= 2;
  return lanes;
}

int32_t lanes_of_piece(const ChannelStats& problem) {
  const int64_t span = problem.element == Element::f32 ? 4 : 8;
  return lanes_for(ceil_div(std::min<int64_t>(problem.pixels, kPiece), span));
}

// Enough blocks to fill a large GPU. Depends on the problem alone, so that results do not depend on the device.
int64_t part_count(const ChannelStats& problem) {
  const int64_t C = std::max<int64_t>(problem.C, 1);
  int64_t wanted = 2048 / ceil_div(C, 256), most = ceil_div(problem.N * problem.pixels, 64);
  if (!problem.channels_last) {
    const int64_t pieces_at_once = kWarp / lanes_of_piece(problem);
    wanted = 16384 / C;
    most = ceil_div(problem.N * ceil_div(problem.pixels, kPiece), pieces_at_once);
  }
  return std::min<int64_t>({std::max<int64_t>(wanted, 1), most, kMostParts});
}

template <typename T>
cudaError_t launch_partials(const ChannelStats& problem, const T* x, float* partial, Work work, cudaStream_t stream) {
  constexpr int kSpan = 16 / sizeof(T);
  const unsigned parts = static_cast<unsigned>(work.parts);
  if (!problem.channels_last) {
    work.lanes = lanes_of_piece(problem);
    return launch(channel_stats_nchw_kernel<T>,
                  {{static_cast<unsigned>(ceil_div(problem.C, kWarps)), parts}, kThreads, 0}, stream, x, partial, work);
  }
  const bool whole = problem.C % kSpan == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t spans = whole ? problem.C / kSpan : problem.C;
  work.lanes = lanes_for(spans);
  const dim3 grid(static_cast<unsigned>(ceil_div(spans, work.lanes)), parts);
  const size_t shared = kThreads * (whole ? kSpan : 1) * sizeof(float);
  return launch(whole ? channel_stats_nhwc_kernel<T, kSpan> : channel_stats_nhwc_kernel<T, 1>, {grid, kThreads, shared},
                stream, x, partial, work);
}

}  // namespace

int64_t channel_stats_workspace(const ChannelStats& problem) { return part_count(problem) * problem.C; }

cudaError_t launch_channel_stats(const ChannelStats& problem,
                                 const void* x,     // [N, C, H, W]
                                 float* mean,       // [C]
                                 float* workspace,  // [channel_stats_workspace(problem)]
                                 cudaStream_t stream) {
  if (problem.C == 0) return cudaSuccess;
  const Work work{problem.N, problem.C, problem.pixels, static_cast<int32_t>(part_count(problem)), 0, problem.relu};
  if (work.parts > 0) {
    const cudaError_t status = with_element(problem.element, [&](auto zero) {
      return launch_partials(problem, static_cast<const decltype(zero)*>(x), workspace, work, stream);
    });
    if (status != cudaSuccess) return status;
  }
  const unsigned blocks = static_cast<unsigned>(ceil_div(problem.C, kFinishChannels));
  return launch(channel_stats_finish_kernel, {blocks, kFinishThreads, kFinishThreads * sizeof(float)}, stream,
                workspace, mean, work);
}

}  // namespace prunekernels
