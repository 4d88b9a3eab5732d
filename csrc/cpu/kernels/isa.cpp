#include "cpu/kernels/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace prunekernels {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2");
  if (vbmi2 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (vbmi2) return Isa::avx512vbmi2;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa parse(const std::string& name) {
  if (name.empty()) return Isa::avx512bf16;
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("PRUNEKERNELS_ISA: expected scalar, avx2, avx512, avx512vbmi2 or avx512bf16, got " +
                              name);
}

Isa initial_cap() {
  const char* name = std::getenv("PRUNEKERNELS_ISA");
  return parse(name ? name : "");
}

std::atomic<Isa>& cap() {
  static std::atomic<Isa> value{initial_cap()};
  return value;
}

}  // namespace

Isa isa() {
  static const Isa detected = detect();
  return std::min(detected, cap().load(std::memory_order_relaxed));
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void cap_isa(const std::string& name) { cap().store(name.empty() ? initial_cap() : parse(name)); }

}  // namespace prunekernels
