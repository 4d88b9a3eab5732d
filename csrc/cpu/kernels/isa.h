// The instruction set the CPU kernels may use: what this CPU has, capped by PRUNEKERNELS_ISA or cap_isa().
#pragma once

#include <string>

namespace prunekernels {

enum class Isa { scalar, avx2, avx512, avx512vbmi2, avx512bf16, amx };  // each includes those before it

#if defined(__x86_64__) && defined(__linux__)
constexpr Isa kBestCompiled = Isa::amx;
#elif defined(__x86_64__)
constexpr Isa kBestCompiled = Isa::avx512bf16;
#else
constexpr Isa kBestCompiled = Isa::scalar;  // the table has its x86 rows here too, but isa() never allows them
#endif

Isa isa();      // the one in force
Isa cpu_isa();  // what the CPU has, without cap and permission
const char* isa_name(Isa isa);
// "" lifts the cap; throws std::invalid_argument on an unknown name. For tests, "amx_model": as "", and kernels for
// AMX run on a model of its instructions, on any CPU.
void cap_isa(const std::string& name);
bool amx_modelled();

}  // namespace prunekernels
