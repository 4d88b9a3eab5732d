// The functions of cuda/kernels/ptx.cuh for the emulator.
#pragma once

#include "core/scalar_types.h"
#include "cuda/emulator/async_products.h"
#include "cuda/emulator/simt.h"

namespace prunekernels {

template <typename T>
T kept(T value) {
  return value;
}

namespace simt {

struct LdmatrixLane {  // the row that this lane names, and the fragments that it receives
  uint16_t row[8];
  uint32_t r[4];
};
template <int kMatrices, bool kTransposed>
void resolve_ldmatrix(void* const* lanes, uint32_t) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < kMatrices; ++m) {
      uint32_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
        const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
        pair[i] = static_cast<const LdmatrixLane*>(lanes[8 * m + row])->row[column];
      }
      static_cast<LdmatrixLane*>(lanes[lane])->r[m] = pair[0] | pair[1] << 16;
    }
}

struct Fragments {  // what a lane brings to mma
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
void mma_m16n8k16_bf16(void* const* lanes, uint32_t);
void mma_m16n8k16_f16(void* const* lanes, uint32_t);
void mma_m16n8k8_tf32(void* const* lanes, uint32_t);

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* name, uint32_t (&r)[kMatrices], uint32_t address) {
  LdmatrixLane mine{};
  if (lane() < 8 * kMatrices) load_shared(address, mine.row, 16, 16);
  meet({name, resolve_ldmatrix<kMatrices, kTransposed>, true}, 0xffffffff, &mine);
  for (int i = 0; i < kMatrices; ++i) r[i] = mine.r[i];
}

inline void mma(const char* name, void (*resolve)(void* const*, uint32_t), float (&d)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[2]) {
  Fragments fragments{d, a, b};
  meet({name, resolve, true}, 0xffffffff, &fragments);
}

}  // namespace simt

inline uint32_t load_two_bytes(const void* from, bool valid) { return valid ? *static_cast<const uint16_t*>(from) : 0; }

template <int kBytes, bool kCached = kBytes != 16>
void cp_async(SharedAddress to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(to, from, kBytes, valid, kCached);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

inline void fence_async_proxy() { simt::fence_async_proxy(); }
inline void wgmma_fence() { simt::fence_products(); }
inline void wgmma_commit() { simt::commit_products(); }
template <int kPending>
void wgmma_wait() {
  simt::wait_for_products(kPending);
}
inline void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, BFloat16) {
  simt::start_product("wgmma.m64n128k16.bf16", d[0], a, b, [](uint16_t bits) -> float { return BFloat16{bits}; });
}
inline void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, Half) {
  simt::start_product("wgmma.m64n128k16.f16", d[0], a, b, [](uint16_t bits) -> float { return Half{bits}; });
}

inline void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row) { simt::ldmatrix<2, false>("ldmatrix.x2", r, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { simt::ldmatrix<4, false>("ldmatrix.x4", r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row) {
  simt::ldmatrix<2, true>("ldmatrix.x2.trans", r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  simt::ldmatrix<4, true>("ldmatrix.x4.trans", r, row);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  simt::mma("mma.m16n8k16.bf16", simt::mma_m16n8k16_bf16, d, a, b);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  simt::mma("mma.m16n8k16.f16", simt::mma_m16n8k16_f16, d, a, b);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma("mma.m16n8k8.tf32", simt::mma_m16n8k8_tf32, d, a, b);
}
// To 10 bits of mantissa, ties away from zero.
inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (bits + 0x1000) & 0xffffe000;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return value; }
inline float to_float(Half value) { return value; }
template <typename T>
T from_float(float value) {
  if (value != value) return T{0x7fff};  // the one NaN that cvt gives
  return T::from(value);
}
template <>
inline float from_float<float>(float value) {
  return value;
}

}  // namespace prunekernels
