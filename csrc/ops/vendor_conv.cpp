#include "ops/vendor_conv.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace prunekernels::vendor {
namespace {

// Addresses of zeros, as many bytes as ever asked for; null where there are none. The system has one page for all that
// is only read. Never given back, since a tensor may still name them: at most twice the largest request.
void* readable(size_t bytes) {
#if defined(__linux__)
  static std::mutex mutex;
  static void* zeros = nullptr;
  static size_t size = 0;
  const std::lock_guard lock(mutex);
  if (bytes > size) {
    const size_t wanted = std::max(bytes, 2 * size);
    void* const found = mmap(nullptr, wanted, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return nullptr;
    zeros = found, size = wanted;
  }
  return zeros;
#else
  return nullptr;
#endif
}

// Whether products of float32 matrices are not allowed fewer bits, which is no word on convolutions.
bool products_are_exact() {
  try {
    return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
  } catch (const c10::Error&) {  // set by torch's newer interface, which this function refuses to read
    return false;
  }
}

// [A, B, 1, 1], dense -> [A, B]
at::Tensor matrix(const at::Tensor& t) { return t.as_strided({t.size(0), t.size(1)}, {t.size(1), 1}); }

at::Tensor product_of(const at::Tensor& a, const at::Tensor& b, at::MemoryFormat format) {
  const at::Tensor result = at::empty({a.size(0), b.size(1), 1, 1}, a.options().memory_format(format));
  at::Tensor rows = matrix(result);
  at::mm_out(rows, a, b);
  return result;
}

}  // namespace

at::Tensor sizes_only(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  const size_t bytes = sizes[0] * C * H * W * options.dtype().itemsize();
  void* const data = options.device().is_cpu() && bytes ? readable(bytes) : nullptr;
  if (!data) return at::empty(sizes, options.memory_format(format));
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const int64_t strides[] = {C * H * W, last ? 1 : H * W, last ? W * C : W, last ? C : 1};
  return at::from_blob(data, sizes, strides, options.memory_format(std::nullopt));
}

bool is_product(const ConvShape& s, at::ScalarType dtype, at::Device device) {
  return (dtype == at::kBFloat16 || (dtype == at::kFloat && products_are_exact())) && device.is_cpu() && s.G == 1 &&
         s.taps() == 1 && s.in_pixels() == 1 && s.out_pixels() == 1 && s.padding[0] == 0 && s.padding[1] == 0;
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   at::MemoryFormat format) {
  if (!bias) return product_of(matrix(x), matrix(weight).t(), format);
  const at::Tensor y = at::empty({x.size(0), weight.size(0), 1, 1}, x.options().memory_format(format));
  at::Tensor rows = matrix(y);
  at::addmm_out(rows, *bias, matrix(x), matrix(weight).t());
  return y;
}

at::Tensor product_grad_input(const at::Tensor& grad, const at::Tensor& weight, at::MemoryFormat format) {
  return product_of(matrix(grad), matrix(weight), format);
}

at::Tensor product_grad_weight(const at::Tensor& grad, const at::Tensor& x, at::MemoryFormat format) {
  return product_of(matrix(grad).t(), matrix(x), format);
}

}  // namespace prunekernels::vendor
