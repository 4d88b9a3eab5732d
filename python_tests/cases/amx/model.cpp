// The model of AMX's instructions for ctypes, and the CPU's own arithmetic to compare it with. Functions return null,
// or what an instruction does not allow.
#include <string>

#include "cpu/kernels/amx_model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace prunekernels;

template <typename Work>
const char* allowed(const Work& work) {
  static thread_local std::string wrong;
  try {
    work();
    return nullptr;
  } catch (const std::logic_error& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}

TileModel tiles;

}  // namespace

extern "C" {

const char* configure(const TileConfig* config) {
  return allowed([&] { tiles.configure(*config); });
}
void configuration(TileConfig* config) { *config = tiles.configuration(); }
void release() { tiles.release(); }
const char* zero(int t) {
  return allowed([&] { tiles.zero(t); });
}
const char* load(int t, const void* from, int64_t stride) {
  return allowed([&] { tiles.load(t, from, stride); });
}
const char* store(int t, void* to, int64_t stride) {
  return allowed([&] { tiles.store(t, to, stride); });
}
const char* dot(int c, int a, int b) {
  return allowed([&] { tiles.dot(c, a, b); });
}

void multiply_add(const float* a, const float* b, const float* c, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = FlushedFloat::multiply_add(a[i], b[i], c[i]);
}
void add(const float* a, const float* b, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = FlushedFloat::add(a[i], b[i]);
}
void narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrowed_to_bfloat16(from[i]);
}

#if defined(__x86_64__)

// The same by the CPU, which flushes subnormal operands and results when MXCSR says so.
int has_fma() { return __builtin_cpu_supports("fma"); }
int has_bf16() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"); }

__attribute__((target("fma"))) void cpu_multiply_add(const float* a, const float* b, const float* c, float* to,
                                                     int64_t count) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  for (int64_t i = 0; i < count; ++i)
    _mm_store_ss(to + i, _mm_fmadd_ss(_mm_load_ss(a + i), _mm_load_ss(b + i), _mm_load_ss(c + i)));
  _mm_setcsr(before);
}
void cpu_add(const float* a, const float* b, float* to, int64_t count) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  for (int64_t i = 0; i < count; ++i) _mm_store_ss(to + i, _mm_add_ss(_mm_load_ss(a + i), _mm_load_ss(b + i)));
  _mm_setcsr(before);
}
__attribute__((target("avx512bf16,avx512vl,avx512bw"))) void cpu_narrow(const float* from, uint16_t* to,
                                                                        int64_t count) {
  for (int64_t i = 0; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(_mm256_loadu_ps(from + i))));
}

#else

int has_fma() { return 0; }
int has_bf16() { return 0; }

#endif

}  // extern "C"
