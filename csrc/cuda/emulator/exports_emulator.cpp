// Kernels for the tests of the emulator itself: single instructions, and programs of reads, writes and barriers.
#include "cuda/kernels/ptx.cuh"

namespace prunekernels {
namespace {

__global__ void ldmatrix_kernel(const uint32_t* image,      // [words]
                                const uint32_t* addresses,  // [32]
                                uint32_t* fragments,        // [32, 4]
                                int words, int matrices, bool transposed) {
  const Shared<uint32_t> shared(0);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < words; i += kWarp) shared.set(i, image[i]);
  __syncwarp();
  uint32_t two[2], four[4];
  const SharedAddress row = shared.address(0) + addresses[lane];
  if (matrices == 2) {
    transposed ? ldmatrix_x2_trans(two, row) : ldmatrix_x2(two, row);
    for (int i = 0; i < 2; ++i) fragments[4 * lane + i] = two[i];
  } else {
    transposed ? ldmatrix_x4_trans(four, row) : ldmatrix_x4(four, row);
    for (int i = 0; i < 4; ++i) fragments[4 * lane + i] = four[i];
  }
}

enum Type : int { kBf16, kF16, kTf32 };

__global__ void mma_kernel(const uint32_t* a,  // [32, 4]
                           const uint32_t* b,  // [32, 2]
                           float* d,           // [32, 4]
                           int type) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t mine_a[4], mine_b[2];
  float mine_d[4];
  for (int i = 0; i < 4; ++i) mine_a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) mine_b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) mine_d[i] = d[4 * lane + i];
  if (type == kBf16) mma_m16n8k16(mine_d, mine_a, mine_b, BFloat16{});
  if (type == kF16) mma_m16n8k16(mine_d, mine_a, mine_b, Half{});
  if (type == kTf32) mma_m16n8k8_tf32(mine_d, mine_a, mine_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = mine_d[i];
}

__global__ void convert_kernel(const float* from,  // [n]
                               uint16_t* bf16,     // [n]
                               uint16_t* f16,      // [n]
                               uint32_t* tf32,     // [n]
                               float* from_bf16,   // [n], of the low half of from's bits
                               float* from_f16) {  // [n]
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto low = static_cast<uint16_t>(__float_as_uint(from[i]));
  bf16[i] = from_float<BFloat16>(from[i]).bits;
  f16[i] = from_float<Half>(from[i]).bits;
  tf32[i] = round_to_tf32(from[i]);
  from_bf16[i] = to_float(BFloat16{low});
  from_f16[i] = to_float(Half{low});
}

enum Warpwide : int { kIndex, kXor, kDown, kUp, kBallot, kAny, kAll };

__global__ void warp_kernel(const int64_t* from,  // [threads]
                            int64_t* to,          // [threads]
                            int what, int argument, int width, unsigned mask) {
  const int i = static_cast<int>(threadIdx.x);
  if (!(mask >> i % kWarp & 1)) return;
  const int64_t mine = from[i];
  switch (what) {
    case kIndex:
      to[i] = __shfl_sync(mask, mine, argument, width);
      break;
    case kXor:
      to[i] = __shfl_xor_sync(mask, mine, argument, width);
      break;
    case kDown:
      to[i] = __shfl_down_sync(mask, mine, static_cast<unsigned>(argument), width);
      break;
    case kUp:
      to[i] = __shfl_up_sync(mask, static_cast<float>(mine), static_cast<unsigned>(argument), width);
      break;
    case kBallot:
      to[i] = __ballot_sync(mask, mine > argument);
      break;
    case kAny:
      to[i] = __any_sync(mask, mine > argument);
      break;
    default:
      to[i] = __all_sync(mask, mine > argument);
  }
}

enum Step : int { kNothing, kRead, kWrite, kSyncwarp, kBarrier };

// Thread i executes steps[i]: it reads or writes shared byte operands[i], or calls __syncwarp(operands[i]) or
// __syncthreads().
__global__ void program_kernel(const int* steps,          // [threads, count]
                               const unsigned* operands,  // [threads, count]
                               int count) {
  const Shared<uint8_t> shared(0);
  for (int s = 0; s < count; ++s) {
    const int at = static_cast<int>(threadIdx.x) * count + s, operand = static_cast<int>(operands[at]);
    if (steps[at] == kRead) shared.get(operand);
    if (steps[at] == kWrite) shared.set(operand, 1);
    if (steps[at] == kSyncwarp) __syncwarp(operands[at]);
    if (steps[at] == kBarrier) __syncthreads();
  }
}

__global__ void count_kernel(unsigned long long* threads) { atomicAdd(threads, 1ull); }

__global__ void votes_kernel(const int* from,  // [threads]
                             int* to) {        // [3, threads]: or, and, count
  const unsigned i = threadIdx.x;
  to[i] = __syncthreads_or(from[i]) != 0;
  to[blockDim.x + i] = __syncthreads_and(from[i]) != 0;
  to[2 * blockDim.x + i] = __syncthreads_count(from[i]);
}

}  // namespace
}  // namespace prunekernels

using namespace prunekernels;

extern "C" {

int pk_ldmatrix(const uint32_t* image, const uint32_t* addresses, uint32_t* fragments, int words, int matrices,
                bool transposed) {
  return launch(ldmatrix_kernel, {1, 32, static_cast<size_t>(words) * 4}, nullptr, image, addresses, fragments, words,
                matrices, transposed);
}

int pk_mma(const uint32_t* a, const uint32_t* b, float* d, int type) {
  return launch(mma_kernel, {1, 32, 0}, nullptr, a, b, d, type);
}

int pk_convert(const float* from, uint16_t* bf16, uint16_t* f16, uint32_t* tf32, float* from_bf16, float* from_f16,
               int n) {  // a multiple of 256
  return launch(convert_kernel, {static_cast<unsigned>(n / 256), 256, 0}, nullptr, from, bf16, f16, tf32, from_bf16,
                from_f16);
}

int pk_warp(const int64_t* from, int64_t* to, int threads, int what, int argument, int width, unsigned mask) {
  return launch(warp_kernel, {1, static_cast<unsigned>(threads), 0}, nullptr, from, to, what, argument, width, mask);
}

int pk_program(const int* steps, const unsigned* operands, int threads, int count, int shared_bytes) {
  return launch(program_kernel, {1, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes)}, nullptr, steps,
                operands, count);
}

int pk_count(unsigned long long* threads, const unsigned* grid, const unsigned* block, int shared_bytes) {
  return launch(count_kernel,
                {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, static_cast<size_t>(shared_bytes)},
                nullptr, threads);
}

int pk_votes(const int* from, int* to, int threads) {
  return launch(votes_kernel, {1, static_cast<unsigned>(threads), 0}, nullptr, from, to);
}
}
