// The masked convolution and its gradients on the device.
#include <torch/library.h>

#include "cuda/compact_conv.h"
#include "cuda/dense_conv.h"
#include "cuda/direct_conv.h"
#include "cuda/plans_cuda.h"
#include "ops/masked_conv.h"

namespace prunekernels {
namespace {

struct Cuda {
  using Mask = DeviceMask;

  static std::shared_ptr<const DeviceMask> read_mask(const char* op, const char* argument, const OptionalTensor& table,
                                                     const ConvShape& s, const at::Tensor& like) {
    return device_mask(op, argument, table, s.K, s.C, s.G, like);
  }
  static std::shared_ptr<const DeviceMask> read_filter_mask(const char* op, const char* argument,
                                                            const OptionalTensor& table, int64_t filters,
                                                            const at::Tensor& like) {
    return device_mask(op, argument, table, filters, -1, -1, like);
  }
  static const MaskTable& table(const DeviceMask& mask) { return mask.table(); }
  static DevicePlans plans(const DeviceMask& mask, at::Device device) { return DevicePlans(mask, device); }
  static at::Tensor narrowed(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat format, const DeviceMask*,
                             bool) {
    return weight.to(dtype).contiguous(format);
  }
  static at::Tensor widened(const at::Tensor& grad, const at::Tensor& weight, const DeviceMask*) {
    return grad.to(weight.scalar_type());
  }
  static bool shows_finite(const at::Tensor&, const ConvShape&) { return false; }  // asking would wait for the device
};

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("masked_conv2d", masked_conv2d<Cuda>);
  m.impl("masked_conv2d_grad_input", masked_conv2d_grad_input<Cuda>);
  m.impl("masked_conv2d_grad_weight", masked_conv2d_grad_weight<Cuda>);
  m.impl("masked_conv2d_grad_bias", masked_conv2d_grad_bias<Cuda>);
}

}  // namespace prunekernels
