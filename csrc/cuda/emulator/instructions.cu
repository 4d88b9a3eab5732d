// A kernel around each function of ptx.cuh, for ctypes: the emulator's tests call them on the host, and
// python_tests/cuda/test_instructions.py has nvcc compile this file and compares a GPU's answers with the host's.
#include "cuda/kernels/ptx.cuh"

#if defined(PK_EMULATED)
#define PK_EXPORT
#else
#define PK_EXPORT __attribute__((visibility("default")))
#endif

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

// Thread i copies piece i, or zeros where it is not valid, to shared memory, and from there piece i ^ 1 to `to`.
template <int kBytes>
__global__ void copy_kernel(const uint32_t* from,  // [threads, kBytes / 4]
                            const int* valid,      // [threads]
                            uint32_t* to,          // [threads, kBytes / 4]
                            int threads) {
  constexpr int kWords = kBytes / 4;
  const Shared<uint32_t> shared(0);
  const int i = static_cast<int>(threadIdx.x);
  for (int w = 0; w < kWords; ++w) shared.set(kWords * (threads + i) + w, 7u);
  cp_async<kBytes>(shared.address(kWords * i), from + kWords * i, valid[i] != 0);
  cp_async_commit();
  cp_async<kBytes>(shared.address(kWords * (threads + i)), from + kWords * i, false);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  for (int w = 0; w < kWords; ++w) to[kWords * i + w] = shared.get(kWords * (i ^ 1) + w);
  cp_async_wait<0>();
}

// d = a b^T by four products of one warpgroup. Rows lie in shared memory as wgmma_rows() says.
template <typename T>
__global__ void wgmma_kernel(const uint16_t* a,  // [64, 64]
                             const uint16_t* b,  // [128, 64]
                             float* d) {         // [128 threads, 64]
#if defined(PK_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Shared<uint16_t> rows(0);  // of a, then of b
  const int i = static_cast<int>(threadIdx.x);
  for (int at = i; at < (64 + 128) * 64; at += 128) {
    const int row = at / 64, vector = at % 64 / 8;
    rows.set(row * 64 + (vector ^ row % 8) * 8 + at % 8, at < 64 * 64 ? a[at] : b[at - 64 * 64]);
  }
  fence_async_proxy();
  __syncthreads();
  float sums[16][4] = {};
  wgmma_fence();
#pragma unroll
  for (int slice = 0; slice < 4; ++slice)
    wgmma_m64n128k16(sums, wgmma_rows(rows.address(16 * slice)), wgmma_rows(rows.address(64 * 64 + 16 * slice)), T{});
  wgmma_commit();
  wgmma_wait<0>();
  for (int j = 0; j < 64; ++j) d[64 * i + j] = sums[j / 4][j % 4];
#endif
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

int pk_wgmma(const uint16_t* a, const uint16_t* b, float* d, int type) {
  return launch(type == kBf16 ? wgmma_kernel<BFloat16> : wgmma_kernel<Half>, {1, 128, (64 + 128) * 64 * 2}, nullptr, a,
                b, d);
}

int pk_convert(const float* from, uint16_t* bf16, uint16_t* f16, uint32_t* tf32, float* from_bf16, float* from_f16,
               int n) {  // a multiple of 256
  return launch(convert_kernel, {static_cast<unsigned>(n / 256), 256, 0}, nullptr, from, bf16, f16, tf32, from_bf16,
                from_f16);
}

int pk_copy(const uint32_t* from, const int* valid, uint32_t* to, int bytes, int threads) {  // an even number
  const LaunchShape shape{1, static_cast<unsigned>(threads), static_cast<size_t>(2 * threads * bytes)};
  const auto kernel = bytes == 4 ? copy_kernel<4> : bytes == 8 ? copy_kernel<8> : copy_kernel<16>;
  return launch(kernel, shape, nullptr, from, valid, to, threads);
}
}
