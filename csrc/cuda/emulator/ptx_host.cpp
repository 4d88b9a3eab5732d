#include "cuda/kernels/ptx.cuh"

namespace prunekernels::simt {
namespace {

template <int kMatrices, bool kTranspose>
void load_matrices(void* const* lanes) {
  Thread_like_guard
}

}  // namespace
}  // namespace prunekernels::simt
