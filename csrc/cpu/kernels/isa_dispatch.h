// Kernels by instruction set: for each kind, kernel_table.inc lists the functions that make them, best first.
#pragma once

#include "cpu/isa.h"

namespace prunekernels {

template <typename Kernels>
struct IsaKernels {
  Isa isa;
  const Kernels& (*kernels)();
};

// Filled in when first asked for: the code that does it may itself need the instruction set.
template <Isa kIsa, auto kMake>
const auto& kernels_of() {
  static const auto kernels = [] {
    if constexpr (kIsa <= kBestCompiled)
      return kMake();
    else
      return decltype(kMake()){};
  }();
  return kernels;
}

template <typename Kernels>
const Kernels& best_allowed(const IsaKernels<Kernels>* row) {
  const Isa allowed = isa();
  while (row->isa > allowed) ++row;  // ends: the last row is scalar
  return row->kernels();
}

}  // namespace prunekernels
