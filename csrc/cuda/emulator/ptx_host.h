// The functions of kernels/ptx.cuh for the emulator.
#pragma once

#include "core/scalar_types.h"
#include "cuda/emulator/simt.h"

namespace prunekernels {

namespace simt {

struct Rows {  // of ldmatrix: this lane's row address, its fragments
  uint32_t address;
  uint32_t r[4];
};
void ldmatrix_x2(void* const* lanes, uint32_t);
void ldmatrix_x4(void* const* lanes, uint32_t);
void ldmatrix_x2_trans(void* const* lanes, uint32_t);
void ldmatrix_x4_trans(void* const* lanes, uint32_t);

struct Fragments {  // of mma
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
void mma_m16n8k16_bf16(void* const* lanes, uint32_t);
void mma_m16n8k16_f16(void* const* lanes, uint32_t);
void mma_m16n8k8_tf32(void* const* lanes, uint32_t);

template <int kCount>
void ldmatrix(const char* name, void (*resolve)(void* const*, uint32_t), uint32_t (&r)[kCount], uint32_t address) {
  Rows rows{address, {}};
  meet({name, resolve, true}, 0xffffffff, &rows);
  for (int i = 0; i < kCount; ++i) r[i] = rows.r[i];
}

inline void mma(const char* name, void (*resolve)(void* const*, uint32_t), float (&d)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[2]) {
  Fragments fragments{d, a, b};
  meet({name, resolve, true}, 0xffffffff, &fragments);
}

}  // namespace simt

template <int kBytes>
void cp_async(SharedAddress to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(to, from, kBytes, valid);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

inline void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row) {
  simt::ldmatrix("ldmatrix.x2", simt::ldmatrix_x2, r, row);
}
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  simt::ldmatrix("ldmatrix.x4", simt::ldmatrix_x4, r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row) {
  simt::ldmatrix("ldmatrix.x2.trans", simt::ldmatrix_x2_trans, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  simt::ldmatrix("ldmatrix.x4.trans", simt::ldmatrix_x4_trans, r, row);
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
