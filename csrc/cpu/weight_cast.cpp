#include "cpu/weight_cast.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "cpu/caching_allocator.h"
#include "cpu/kernels/cast.h"
#include "cpu/tensor_access.h"

namespace prunekernels {
namespace {

constexpr int64_t kGrain = 32 << 10;  // elements; less per thread is not worth waking it

// move(k, elements, is_live) for every row, divided among the threads.
template <typename Move>
void each_row(const at::Tensor& weight, const MaskTable* mask, Move move) {
  const int64_t rows = weight.size(0), elements = weight.numel() / std::max<int64_t>(1, rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) move(k, elements, !mask || mask->out_slot()[k] >= 0);
                   });
}

bool is_dense(const at::Tensor& t, at::MemoryFormat format) { return t.is_contiguous(format); }

}  // namespace

at::Tensor narrowed(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat format, const MaskTable* mask,
                    bool whole) {
  if (weight.scalar_type() == dtype) return weight.contiguous(format);
  if (dtype != at::kBFloat16) return weight.to(dtype).contiguous(format);
  const at::MemoryFormat own = is_dense(weight, format) ? format : weight.suggest_memory_format();
  const at::Tensor from = weight.contiguous(own);
  const at::Tensor to = empty_cached(from.sizes(), from.options().dtype(dtype), own);
  const CastKernels& kernels = cast_kernels();
  each_row(from, mask, [&](int64_t k, int64_t count, bool is_live) {
    BFloat16* const row = elements<BFloat16>(to) + k * count;
    if (is_live)
      kernels.narrow(const_elements<float>(from) + k * count, row, count);
    else if (whole)
      std::memset(row, 0, count * sizeof(*row));
  });
  return to.contiguous(format);
}

at::Tensor widened(const at::Tensor& grad, const at::Tensor& weight, const MaskTable* mask) {
  if (grad.scalar_type() == weight.scalar_type()) return grad;
  if (grad.scalar_type() != at::kBFloat16) return grad.to(weight.scalar_type());
  const at::MemoryFormat format = weight.suggest_memory_format();
  const at::Tensor from = grad.contiguous(format), to = empty_cached(weight.sizes(), weight.options(), format);
  const CastKernels& kernels = cast_kernels();
  each_row(from, mask, [&](int64_t k, int64_t count, bool is_live) {
    float* const row = elements<float>(to) + k * count;
    if (is_live)
      kernels.widen(const_elements<BFloat16>(from) + k * count, row, count);
    else
      std::memset(row, 0, count * sizeof(*row));
  });
  return to;
}

}  // namespace prunekernels
