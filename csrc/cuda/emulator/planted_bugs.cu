// Kernels with one bug each, which the emulator must report, and the same kernels without it, which must run clean.
//     to[i] = from[...]   one block (two where it says so) of 64 threads, thread i writes element i
#include <cstring>

#include "cuda/kernels/ptx.cuh"

namespace prunekernels {
namespace {

constexpr int kThreads = 64;
constexpr uint32_t kAll = 0xffffffff;

PK_DEVICE int me() { return static_cast<int>(threadIdx.x); }
PK_DEVICE int before(int i) { return i > 0 ? i - 1 : 0; }

// ---- barriers and races ----

template <bool kBug>
__global__ void missing_barrier(const float* from, float* to, int) {
  const Shared<float> shared(0);
  shared.set(me(), from[me()]);
  if (!kBug) __syncthreads();
  to[me()] = shared.get(before(me()));
}

template <bool kBug>
__global__ void overwritten_while_read(const float* from, float* to, int) {
  const Shared<float> shared(0);
  shared.set(me(), from[me()]);
  __syncthreads();
  const float value = shared.get((me() + 1) % kThreads);
  if (!kBug) __syncthreads();
  shared.set(me(), value);
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void two_writers(const float* from, float* to, int) {  // of the same value: a race all the same
  const Shared<float> shared(0);
  if (kBug || me() == 7) shared.set(0, from[0]);
  __syncthreads();
  to[me()] = shared.get(0);
}

template <bool kBug>
__global__ void missing_syncwarp(const float* from, float* to, int) {  // a vote does not order memory
  const Shared<float> shared(0);
  shared.set(me(), from[me()]);
  if (kBug)
    __any_sync(kAll, 1);
  else
    __syncwarp();
  to[me()] = shared.get(me() ^ 1);
}

template <bool kBug>
__global__ void barrier_not_reached(const float* from, float* to, int) {
  if (kBug && me() == kThreads - 1) return;
  __syncthreads();
  to[me()] = from[me()];
}

template <bool kBug>
__global__ void barriers_of_two_kinds(const float* from, float* to, int) {
  const int count = kBug && me() == 0 ? __syncthreads_or(1) : __syncthreads_count(1);
  to[me()] = from[me()] * static_cast<float>(count);
}

// ---- shared memory ----

template <bool kBug>
__global__ void unwritten(const float* from, float* to, int) {
  const Shared<float> shared(0);
  if (!kBug || me() != 5) shared.set(me(), from[me()]);
  __syncthreads();
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void left_by_another_block(const float* from, float* to, int) {  // two blocks
  const Shared<float> shared(0);
  if (!kBug || blockIdx.x == 0) shared.set(me(), from[me()]);
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void out_of_range(const float* from, float* to, int) {
  const Shared<float> shared(0);
  shared.set(me(), from[me()]);
  __syncthreads();
  to[me()] = shared.get(before(me()) + (kBug ? 2 : 0));
}

template <bool kBug>
__global__ void misaligned_vector(const float* from, float* to, int) {
  const Shared<float> shared(0);
  shared.set(me(), from[me()]);
  __syncthreads();
  to[me()] = shared.get_vector<float4>(kBug ? 2 : 4).x;
}

// ---- global memory ----

template <bool kBug>
__global__ void off_by_one(const float* from, float* to, int n) {
  for (int i = me(); kBug ? i <= n : i < n; i += kThreads) to[i] = from[i];
}

template <bool kBug>
__global__ void misaligned_global_vector(const float* from, float* to, int) {
  to[me()] = reinterpret_cast<const float4*>(from + (kBug ? 1 : 0))->x;
}

__device__ int deep(int levels) {
  volatile int here[64] = {levels};
  return levels == 0 ? 0 : deep(levels - 1) + here[0];
}

template <bool kBug>
__global__ void too_deep(const float* from, float* to, int) {
  to[me()] = from[me()] + static_cast<float>(deep(kBug ? 10000 : 10));
}

// ---- cp.async ----

template <bool kBug>
__global__ void missing_wait(const float* from, float* to, int) {
  const Shared<float> shared(0);
  cp_async<4>(shared.address(me()), from + me(), true);
  cp_async_commit();
  if (!kBug) cp_async_wait<0>();
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void missing_commit(const float* from, float* to, int) {
  const Shared<float> shared(0);
  cp_async<4>(shared.address(me()), from + me(), true);
  if (!kBug) cp_async_commit();
  cp_async_wait<0>();
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void waits_for_too_few(const float* from, float* to, int) {
  const Shared<float> shared(0);
  for (int stage = 0; stage < 2; ++stage) {
    cp_async<4>(shared.address(stage * kThreads + me()), from + me(), true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  to[me()] = shared.get((kBug ? kThreads : 0) + me());
}

template <bool kBug>
__global__ void no_barrier_after_wait(const float* from, float* to, int) {
  const Shared<float> shared(0);
  cp_async<4>(shared.address(me()), from + me(), true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kBug) __syncthreads();
  to[me()] = shared.get(before(me()));
}

template <bool kBug>
__global__ void written_under_a_copy(const float* from, float* to, int) {
  const Shared<float> shared(0);
  cp_async<4>(shared.address(me()), from + me(), false);
  cp_async_commit();
  if (!kBug) cp_async_wait<0>();
  shared.set(me(), from[me()]);
  to[me()] = shared.get(me());
}

template <bool kBug>
__global__ void misaligned_copy(const float* from, float* to, int) {
  const Shared<float> shared(0);
  if (me() == 0) cp_async<16>(shared.address(0), from + (kBug ? 1 : 4), true);
  to[me()] = from[me()];
}

template <bool kBug>
__global__ void misaligned_copy_target(const float* from, float* to, int) {
  const Shared<float> shared(0);
  if (me() == 0) cp_async<8>(shared.address(kBug ? 1 : 2), from, true);
  to[me()] = from[me()];
}

// ---- warps ----

template <bool kBug>
__global__ void half_a_warp(const float* from, float* to, int) {
  float value = from[me()];
  if (!kBug || me() < 16) value = __shfl_xor_sync(kAll, value, 1);
  to[me()] = value;
}

template <bool kBug>
__global__ void returned_early(const float* from, float* to, int) {
  if (kBug && me() == 40) return;
  to[me()] = __shfl_xor_sync(kAll, from[me()], 1);
}

template <bool kBug>
__global__ void two_collectives(const float* from, float* to, int) {
  const float value = from[me()];
  to[me()] = kBug && me() < 16 ? __shfl_down_sync(kAll, value, 1) : __shfl_xor_sync(kAll, value, 1);
}

template <bool kBug>
__global__ void not_in_its_mask(const float* from, float* to, int) {
  to[me()] = __shfl_xor_sync(kBug ? 0x0000ffff : kAll, from[me()], 1);
}

// to [16, 8] = from[0:128] as [16, 8] x from[128:192] as [8, 8]
template <bool kBug>
__global__ void wrong_fragment(const float* from, float* to, int) {
  const int group = me() % kWarp / 4, t = me() % 4;
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) a[r] = round_to_tf32(from[(group + 8 * (r % 2)) * 8 + t + 4 * (r / 2)]);
  for (int r = 0; r < 2; ++r) b[r] = round_to_tf32(from[128 + (kBug ? 2 * t + r : t + 4 * r) * 8 + group]);
  float d[4] = {};
  mma_m16n8k8_tf32(d, a, b);
  if (me() < kWarp)
    for (int i = 0; i < 4; ++i) to[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// ---- products of a warpgroup: blocks of 128 threads ----

enum class Left { out_nothing, wait, proxy_fence, fence, barrier, tile_start, operands_alone };

// to[i] = 16, the first sum of thread i: all operands are ones.
template <Left kLeft>
PK_DEVICE void multiply_ones(float* to) {
  const Shared<BFloat16> tile(0);  // rows [64 + 128] of 64 elements
  const BFloat16 one = from_float<BFloat16>(1);
  for (int i = me(); i < (64 + 128) * 64; i += 2 * kThreads) tile.set(i, one);
  if (kLeft != Left::proxy_fence) fence_async_proxy();
  if (kLeft != Left::barrier) __syncthreads();
  float sums[16][4] = {};
  if (kLeft != Left::fence) wgmma_fence();
  const int first = kLeft == Left::tile_start ? 64 : 0;
  wgmma_m64n128k16(sums, wgmma_rows(tile.address(first)), wgmma_rows(tile.address(64 * 64)), BFloat16{});
  wgmma_commit();
  __syncthreads();
  if (kLeft == Left::operands_alone) tile.set(me(), from_float<BFloat16>(2)), fence_async_proxy();
  __syncthreads();
  if (kLeft != Left::wait) wgmma_wait<0>();
  if (me() < kThreads) to[me()] = sums[0][0];
}

template <bool kBug>
__global__ void product_not_waited_for(const float*, float* to, int) {
  multiply_ones<kBug ? Left::wait : Left::out_nothing>(to);
}
template <bool kBug>
__global__ void product_without_proxy_fence(const float*, float* to, int) {
  multiply_ones<kBug ? Left::proxy_fence : Left::out_nothing>(to);
}
template <bool kBug>
__global__ void product_without_fence(const float*, float* to, int) {
  multiply_ones<kBug ? Left::fence : Left::out_nothing>(to);
}
template <bool kBug>
__global__ void product_without_barrier(const float*, float* to, int) {
  multiply_ones<kBug ? Left::barrier : Left::out_nothing>(to);
}
template <bool kBug>
__global__ void product_off_its_tile(const float*, float* to, int) {
  multiply_ones<kBug ? Left::tile_start : Left::out_nothing>(to);
}
template <bool kBug>
__global__ void product_overwritten(const float*, float* to, int) {
  multiply_ones<kBug ? Left::operands_alone : Left::out_nothing>(to);
}

struct Planted {
  const char* name;
  void (*kernels[2])(const float*, float*, int);
  unsigned blocks;
  size_t shared_bytes;
  unsigned threads = kThreads;
};

#define PLANTED(kernel, blocks, shared_floats) {#kernel, {kernel<false>, kernel<true>}, blocks, shared_floats * 4}
#define PLANTED_PRODUCT(kernel) {#kernel, {kernel<false>, kernel<true>}, 1, (64 + 128) * 64 * 2, 2 * kThreads}
const Planted kPlanted[] = {
    PLANTED(missing_barrier, 1, 64),
    PLANTED(overwritten_while_read, 1, 64),
    PLANTED(two_writers, 1, 1),
    PLANTED(missing_syncwarp, 1, 64),
    PLANTED(barrier_not_reached, 1, 0),
    PLANTED(barriers_of_two_kinds, 1, 0),
    PLANTED(unwritten, 1, 64),
    PLANTED(left_by_another_block, 2, 64),
    PLANTED(out_of_range, 1, 64),
    PLANTED(misaligned_vector, 1, 64),
    PLANTED(off_by_one, 1, 0),
    PLANTED(misaligned_global_vector, 1, 0),
    PLANTED(missing_wait, 1, 64),
    PLANTED(missing_commit, 1, 64),
    PLANTED(waits_for_too_few, 1, 128),
    PLANTED(no_barrier_after_wait, 1, 64),
    PLANTED(written_under_a_copy, 1, 64),
    PLANTED(misaligned_copy, 1, 64),
    PLANTED(half_a_warp, 1, 0),
    PLANTED(returned_early, 1, 0),
    PLANTED(two_collectives, 1, 0),
    PLANTED(not_in_its_mask, 1, 0),
    PLANTED(wrong_fragment, 1, 0),
    PLANTED(misaligned_copy_target, 1, 64),
    PLANTED(too_deep, 1, 0),
    PLANTED_PRODUCT(product_not_waited_for),
    PLANTED_PRODUCT(product_without_proxy_fence),
    PLANTED_PRODUCT(product_without_fence),
    PLANTED_PRODUCT(product_without_barrier),
    PLANTED_PRODUCT(product_off_its_tile),
    PLANTED_PRODUCT(product_overwritten),
};
#undef PLANTED
#undef PLANTED_PRODUCT

}  // namespace
}  // namespace prunekernels

extern "C" int pk_planted(const char* name, bool bug,
                          const float* from,  // [64], or as the kernel says
                          float* to, int n) {
  using namespace prunekernels;
  for (const Planted& planted : kPlanted)
    if (std::strcmp(planted.name, name) == 0)
      return launch(planted.kernels[bug], {planted.blocks, planted.threads, planted.shared_bytes}, nullptr, from, to,
                    n);
  return cudaErrorInvalidValue;
}
