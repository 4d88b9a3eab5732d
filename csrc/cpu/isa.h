// The instruction set the CPU kernels may use: what this CPU has, capped by PRUNEKERNELS_ISA or cap_isa().
#pragma once

#include <string>

namespace prunekernels {

enum class Isa { scalar, avx2, avx512, avx512vbmi2 };  // each includes those before it

Isa isa();  // the one in force
const char* isa_name(Isa isa);
void cap_isa(const std::string& name);  // "" lifts the cap; throws std::invalid_argument on an unknown name

}  // namespace prunekernels
