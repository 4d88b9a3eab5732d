// The caching allocator of results.
#pragma once

#include <ATen/core/Tensor.h>

namespace prunekernels {

// at::empty, from a cache of freed blocks. The system's allocator returns blocks of some megabytes to the system, and
// taking their pages again can cost several times what a 1x1 convolution computes; so such blocks stay here for the
// next step. At most PRUNEKERNELS_KEEP_MB stay (default 1024; 0: none), and a block that no request has fitted for a
// while is returned. A memory profiler counts a cached block as free; the system does not.
at::Tensor empty_cached(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

}  // namespace prunekernels
