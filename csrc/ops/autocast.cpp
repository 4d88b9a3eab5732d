// masked_conv2d under autocast computes in the autocast dtype, as conv2d does. A float32 weight stays as it is: plans
// cast what they read of it, and its gradient comes in float32.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace prunekernels {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using OptionalTensor = std::optional<Tensor>;
using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                         SymInt, std::string_view);

template <c10::DeviceType kDevice>
Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
            const OptionalTensor& grad_mask, const OptionalTensor& grad_scale, SymIntArrayRef stride,
            SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view plan) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("prunekernels::masked_conv2d", "").typed<Signature>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet{c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  const bool stays = weight.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  return op.call(cast(x), stays ? weight : cast(weight), bias ? OptionalTensor(cast(*bias)) : std::nullopt, mask,
                 grad_mask, grad_scale, stride, padding, dilation, std::move(groups), plan);
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, AutocastCPU, m) { m.impl("masked_conv2d", conv<c10::kCPU>); }
TORCH_LIBRARY_IMPL(prunekernels, AutocastCUDA, m) { m.impl("masked_conv2d", conv<c10::kCUDA>); }

}  // namespace prunekernels
