#include "cpu/kernels/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prunekernels {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16", "amx"};

#if defined(__x86_64__) && defined(__linux__)

// The CPU has tiles and products of bfloat16 of them, and the kernel keeps their state (XCR0).
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: xgetbv is allowed
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;                // palette 1
  const bool usual = (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;  // bytes of a row, tiles, rows
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return usual && (low >> 17 & 3) == 3;
}

// Linux lets a process use tiles once it has asked, and may refuse: alternate signal stacks may be too small.
bool amx_permitted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return permitted;
}

#else

bool has_amx() { return false; }
bool amx_permitted() { return false; }

#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2");
  if (vbmi2 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? Isa::amx : Isa::avx512bf16;
  if (vbmi2) return Isa::avx512vbmi2;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa parse(const std::string& name) {
  if (name.empty()) return Isa::amx;
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("PRUNEKERNELS_ISA: expected scalar, avx2, avx512, avx512vbmi2, avx512bf16 or amx, got " +
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

std::atomic<bool> modelled{false};

}  // namespace

Isa cpu_isa() {
  static const Isa detected = detect();
  return detected;
}

Isa isa() {
  const Isa allowed = std::min(cpu_isa(), cap().load(std::memory_order_relaxed));
  return allowed == Isa::amx && !amx_permitted() ? Isa::avx512bf16 : allowed;
}

bool amx_modelled() { return modelled.load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void cap_isa(const std::string& name) {
  const bool model = name == "amx_model";
  cap().store(name.empty() || model ? initial_cap() : parse(name));
  modelled.store(model);
}

}  // namespace prunekernels
