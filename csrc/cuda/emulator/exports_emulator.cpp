// The emulator's own tests: instructions, one warp each.
#include "cuda/kernels/ptx.cuh"

namespace prunekernels {
namespace {

__global__ void sum_kernel(const float* from, float* to) {  // one warp
  float sum = from[threadIdx.x];
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
  to[threadIdx.x] = sum;
}

__global__ void shared_kernel(const float* from, float* to, bool wait) {
  const Shared<float> shared(0);
  shared.set(static_cast<int>(threadIdx.x), from[threadIdx.x]);
  if (wait) __syncthreads();
  to[threadIdx.x] = shared.get(static_cast<int>(blockDim.x - 1 - threadIdx.x));
}

}  // namespace
}  // namespace prunekernels

using namespace prunekernels;

extern "C" {

int pk_sum(const float* from, float* to) { return launch(sum_kernel, {1, 32, 0}, nullptr, from, to); }

int pk_shared(const float* from, float* to, int threads, bool wait) {
  return launch(shared_kernel, {1, static_cast<unsigned>(threads), static_cast<size_t>(threads) * 4}, nullptr, from, to,
                wait);
}
}
