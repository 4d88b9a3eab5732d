// The masked convolution and its gradients on CPU.
#include <torch/library.h>

#include "cpu/compact_conv.h"
#include "cpu/dense_conv.h"
#include "cpu/direct_conv.h"
#include "cpu/plans_cpu.h"
#include "cpu/weight_cast.h"
#include "ops/masked_conv.h"

namespace prunekernels {
namespace {

struct Cpu {
  using Mask = MaskTable;

  static std::optional<MaskTable> read_mask(const char* op, const char* argument, const OptionalTensor& table,
                                            const ConvShape& s, const at::Tensor&) {
    return prunekernels::read_mask(op, argument, table, s.K, s.C, s.G);
  }
  static std::optional<MaskTable> read_filter_mask(const char* op, const char* argument, const OptionalTensor& table,
                                                   int64_t filters, const at::Tensor&) {
    return prunekernels::read_filter_mask(op, argument, table, filters);
  }
  static const MaskTable& table(const MaskTable& mask) { return mask; }
  static const PlanDevice& plans(const MaskTable&, at::Device) { return cpu_plans(); }
  static at::Tensor narrowed(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat format,
                             const MaskTable* mask, bool whole) {
    return prunekernels::narrowed(weight, dtype, format, mask, whole);
  }
  static at::Tensor widened(const at::Tensor& grad, const at::Tensor& weight, const MaskTable* mask) {
    return prunekernels::widened(grad, weight, mask);
  }
  static bool shows_finite(const at::Tensor& grad_weight, const ConvShape& s) {
    return prunekernels::shows_finite(grad_weight, s);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("masked_conv2d", masked_conv2d<Cpu>);
  m.impl("masked_conv2d_grad_input", masked_conv2d_grad_input<Cpu>);
  m.impl("masked_conv2d_grad_weight", masked_conv2d_grad_weight<Cpu>);
  m.impl("masked_conv2d_grad_bias", masked_conv2d_grad_bias<Cpu>);
}

}  // namespace prunekernels
