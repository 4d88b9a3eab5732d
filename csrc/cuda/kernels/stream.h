// The two CUDA types that launchers show to the outer ring.
#pragma once

#if defined(PK_EMULATED)
#include "cuda/emulator/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace prunekernels {

enum class Element { f32, bf16, f16 };

}  // namespace prunekernels
