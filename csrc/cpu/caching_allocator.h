// Fresh memory for full-width results.
#pragma once

#include <ATen/core/Tensor.h>

namespace prunekernels {

// at::empty for results. Blocks of some megabytes, once freed, are kept for the next step: the system's allocator gives
// them back, and taking their pages anew can cost several times what a 1x1 convolution computes. At most
// PRUNEKERNELS_KEEP_MB are kept (default 1024; 0: nothing), and what nobody asks for any more goes. To a profiler of
// memory a kept block is free; to the system it is not.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

}  // namespace prunekernels
