// One function for each instruction that C++ does not have; cuda/emulator/ptx_host.h has the same functions for the
// host. A fragment is what one lane of the warp holds; its layout is that of the PTX manual's mma.m16n8k* pages.
#pragma once

#include "core/scalar_types.h"
#include "cuda/kernels/launch.cuh"

#if defined(PK_EMULATED)
#include "cuda/emulator/ptx_host.h"
#else

namespace prunekernels {

// The value, in a register of its own: the compiler cannot take apart what it was computed from, to compute parts of it
// again and again in a loop.
PK_DEVICE int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <typename T>
PK_DEVICE const T* kept(const T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// The two bytes at `from`, zero-extended; valid = false: reads nothing and gives 0.
PK_DEVICE uint32_t load_two_bytes(const void* from, bool valid) {
  uint32_t bits;
  asm("{\n"
      "  .reg .pred valid;\n"
      "  setp.ne.b32 valid, %2, 0;\n"
      "  mov.b32 %0, 0;\n"
      "  @valid ld.global.u16 %0, [%1];\n"
      "}"
      : "=r"(bits)
      : "l"(from), "r"(static_cast<int>(valid)));
  return bits;
}

// Starts a copy of kBytes (4, 8 or 16; both addresses aligned to as many) from global to shared memory. valid = false:
// reads nothing and writes zeros. kCached: what is read stays in the L1 cache (less than 16 bytes always do).
template <int kBytes, bool kCached = kBytes != 16>
PK_DEVICE void cp_async(SharedAddress to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (!kCached)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
}
PK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are unfinished. Other threads see the data after a
// barrier.
template <int kPending>
PK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Lane 8 m + i passes the address of row i (16 bytes) of matrix m. Each lane receives, of every matrix, elements
// 2 (lane % 4) and 2 (lane % 4) + 1 of row lane / 4. trans: of the transposed matrix.
PK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}
PK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
PK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}
PK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a b by one warp: a 16 x 16, b 16 x 8, d 16 x 8. The last argument gives the element type of a and b.
PK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += a b by one warp: a 16 x 8, b 8 x 8, d 16 x 8. Elements of a and b are rounded by round_to_tf32.
PK_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// ---- products of a warpgroup, sm_90a alone. The 128 threads of four warps, the first a multiple of four, act
// together.

// Makes what this thread has written to shared memory visible to products, after the next barrier.
PK_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Hands the sums over to the products that follow.
PK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the committed groups are unfinished. Sums are valid when all are finished.
template <int kPending>
PK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define PK_WGMMA(type)                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " PK_WGMMA_SUMS \
               "%64, %65, 1, 1, 1, 0, 0;"                                                     \
               : PK_WGMMA_OPERANDS                                                            \
               : "l"(a), "l"(b))
#define PK_WGMMA_SUMS                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
  "%59, %60, %61, %62, %63}, "
#define PK_WGMMA_OPERANDS                                                                                             \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),            \
      "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),        \
      "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),        \
      "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),        \
      "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]),        \
      "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),      \
      "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]), \
      "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), \
      "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), \
      "+f"(d[15][3])

// Starts d += a b^T. a [64][16], b [128][16] in shared memory, by wgmma_rows(). Row 16 (warp % 4) + 8 (e / 2) + lane /
// 4 and column 8 j + 2 (lane % 4) + e % 2 of d is this lane's d[j][e].
PK_DEVICE void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, BFloat16) { PK_WGMMA("bf16"); }
PK_DEVICE void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, Half) { PK_WGMMA("f16"); }
#undef PK_WGMMA
#undef PK_WGMMA_SUMS
#undef PK_WGMMA_OPERANDS

PK_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

PK_DEVICE float to_float(float value) { return value; }
PK_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
PK_DEVICE float to_float(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
// Rounds to the nearest, ties to even.
template <typename T>
PK_DEVICE T from_float(float value);
template <>
PK_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
PK_DEVICE BFloat16 from_float<BFloat16>(float value) {
  BFloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}
template <>
PK_DEVICE Half from_float<Half>(float value) {
  Half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

}  // namespace prunekernels

#endif

namespace prunekernels {

// The descriptor of a tile whose rows are 128 bytes apart, of which products take 32 bytes from `first` on. The tile
// begins at a multiple of 1024 bytes; of row r, 16 bytes c lie at place c ^ r % 8.
PK_DEVICE uint64_t wgmma_rows(SharedAddress first) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 1024 >> 4, kIgnored = 1;
  return kSwizzle128 | kEightRows << 32 | kIgnored << 16 | (first & 0x3ffff) >> 4;
}

}  // namespace prunekernels
