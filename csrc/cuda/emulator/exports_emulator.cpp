// Kernels for the tests of the emulator itself: warps, and programs of reads, writes and barriers. Single instructions
// are in instructions.cu.
#include "cuda/kernels/ptx.cuh"

namespace prunekernels {
namespace {

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
