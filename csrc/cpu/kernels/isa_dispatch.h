// Chooses the kernels of one kind (microkernels, optim, ...) by instruction set, from the rows that kernel_table.inc
// lists for that kind, best first.
#pragma once

#include "cpu/kernels/isa.h"

namespace prunekernels {

template <typename Kernels>
struct IsaKernels {
  Isa isa;
  const Kernels& (*kernels)();
};

// The kernels that kMake makes. Made on first use only: the code that makes them may itself need the instruction set.
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
