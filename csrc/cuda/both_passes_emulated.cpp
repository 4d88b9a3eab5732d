// An operator for tests: forward and input gradient with what ops/conv_autograd.cpp hands from one to the other, which
// Python's gradients of the emulated operators do not.
#include "cuda/device.h"

#if defined(PK_EMULATED)

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/aside.h"

namespace prunekernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// While it lives, whether torch lets convolutions of floats run in tf32; nothing: as before.
class AllowedTf32 {
 public:
  explicit AllowedTf32(std::optional<bool> allowed) : before_(device::allows_tf32()) {
    at::globalContext().setAllowTF32CuDNN(allowed.value_or(before_));
  }
  ~AllowedTf32() { at::globalContext().setAllowTF32CuDNN(before_); }

 private:
  const bool before_;
};

std::tuple<Tensor, Tensor> both_passes(const Tensor& x, const Tensor& weight, const OptionalTensor& mask,
                                       const Tensor& grad_out, at::IntArrayRef padding, int64_t groups,
                                       std::string_view plan, std::string_view backward_plan,
                                       std::optional<bool> backward_tf32) {
  using c10::SymInt, c10::SymIntArrayRef;
  const auto forward =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, std::string_view)>(
          "prunekernels_emulated::masked_conv2d");
  const auto backward = find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef, bool,
                                    SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, std::string_view)>(
      "prunekernels_emulated::masked_conv2d_grad_input");
  const std::vector<SymInt> ones(2, 1), pads(padding.begin(), padding.end());
  Aside<MaskedCopy> masked(weight);
  Aside<PackedCopy> packed(weight);
  const Tensor y = forward.call(x, weight, std::nullopt, mask, mask, std::nullopt, ones, pads, ones, groups, plan);
  const Tensor& read = masked.fact.copy.defined() ? masked.fact.copy : weight;
  const Aside<DeadAreZero> known(masked.fact.copy);
  const Aside<PackedCopy> left(read, packed.fact);
  const AllowedTf32 allowed(backward_tf32);
  const Tensor grad_x =
      backward.call(grad_out, read, mask, x.sym_sizes(), x.suggest_memory_format() == at::MemoryFormat::ChannelsLast,
                    ones, pads, ones, groups, backward_plan);
  return {y, grad_x};
}

}  // namespace

PK_DEVICE_OPERATORS(m) { m.impl("both_passes", both_passes); }

}  // namespace prunekernels

#endif
