// What every launcher's header needs: cudaStream_t, cudaError_t, and the element types of the kernels.
#pragma once

#if defined(PK_EMULATED)
#include "cuda/emulator/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace prunekernels {

enum class Element { f32, bf16, f16 };

}  // namespace prunekernels
