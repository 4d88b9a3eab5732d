#include "cpu/fresh.h"

#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace prunekernels {
namespace {

constexpr int64_t kHugeFrom =
    4 << 20;  // smaller blocks are mostly recycled by the allocator, their pages already there

}  // namespace

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  at::Tensor t = at::empty(sizes, options.memory_format(format));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes >= kHugeFrom) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: refusal changes nothing
  }
#endif
  return t;
}

}  // namespace prunekernels
