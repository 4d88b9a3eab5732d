#include "cpu/kernels/mask_grad.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/isa_dispatch.h"
#include "cpu/kernels/mask_grad_impl.h"

namespace prunekernels {

#define PK_MASK_GRAD(isa) MaskGradKernels mask_grad_kernels_##isa();
#include "kernel_table.inc"

MaskGradKernels mask_grad_kernels_scalar() { return mask_grad_kernels_of<MaskedScalar<float>>(); }

const MaskGradKernels& mask_grad_kernels() {
  static constexpr IsaKernels<MaskGradKernels> rows[] = {
#define PK_MASK_GRAD(isa) {Isa::isa, kernels_of<Isa::isa, mask_grad_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

template <typename T>
void mask_grad(const MaskGradRow<T>& row) {
  mask_grad_row<MaskedScalar<T>>(row);
}

template <typename T>
void row_norm(const NormRow<T>& row) {
  norm_row<MaskedScalar<T>>(row);
}

template <typename T>
void kernel_norms(const T* weight, const uint32_t* pairs, int64_t channels, int64_t taps, bool channels_last,
                  typename Arithmetic<T>::type* abs_sums, typename Arithmetic<T>::type* square_sums) {
  using A = typename Arithmetic<T>::type;
  const int64_t channel = channels_last ? 1 : taps, tap = channels_last ? channels : 1;
  std::fill(abs_sums, abs_sums + channels, A{});
  std::fill(square_sums, square_sums + channels, A{});
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < channels; ++c) {
      const A w = static_cast<A>(weight[c * channel + t * tap]);
      abs_sums[c] += std::fabs(w);
      square_sums[c] += w * w;
    }
  if (!pairs) return;
  for (int64_t c = 0; c < channels; ++c)
    if (!(pairs[c >> 5] >> (c & 31) & 1))
      abs_sums[c] = square_sums[c] = A{};  // whatever the weights held, NaN included
}

#define PK_INSTANTIATE(T)                         \
  template void mask_grad(const MaskGradRow<T>&); \
  template void row_norm(const NormRow<T>&);
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

#define PK_INSTANTIATE(T, A) template void kernel_norms(const T*, const uint32_t*, int64_t, int64_t, bool, A*, A*);
PK_INSTANTIATE(float, float)
PK_INSTANTIATE(double, double)
PK_INSTANTIATE(BFloat16, float)
PK_INSTANTIATE(Half, float)
#undef PK_INSTANTIATE

}  // namespace prunekernels
