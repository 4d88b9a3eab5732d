// Rows of float to bfloat16, to the nearest, and back.
#pragma once

#include <cstdint>

#include "core/scalar_types.h"

namespace prunekernels {

struct CastKernels {
  void (*narrow)(const float* from, BFloat16* to, int64_t count);
  void (*widen)(const BFloat16* from, float* to, int64_t count);
};

const CastKernels& cast_kernels();  // the best the instruction set in force allows

}  // namespace prunekernels
