#include "cuda/kernels/igemm.h"
#include "cuda/kernels/igemm_launch.cuh"

namespace prunekernels {
namespace {

template <typename Math, typename Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    block_sparse_grad_input_kernel(const ConvolveParams p) {
  convolve<Math, Tile, kVectors, true>(p);
}

struct Kernels {
  template <typename Math, typename Tile, bool kVectors>
  static auto kernel() {
    return block_sparse_grad_input_kernel<Math, Tile, kVectors>;
  }
};

}  // namespace

cudaError_t block_sparse_grad_input(const IgemmArgs& args, cudaStream_t stream) {
  return launch_convolution<Kernels, true>(args, true, stream);
}

}  // namespace prunekernels
