#include "cuda/kernels/igemm.h"
#include "cuda/kernels/igemm_grad_launch.cuh"

namespace prunekernels {
namespace {

template <typename Math, typename Tile, bool kFilterVectors, bool kChannelVectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    block_sparse_grad_weight_kernel(const GradWeightParams p) {
  grad_weight<Math, Tile, kFilterVectors, kChannelVectors, true>(p);
}

struct Kernels {
  template <typename Math, typename Tile, bool kFilterVectors, bool kChannelVectors>
  static auto kernel() {
    return block_sparse_grad_weight_kernel<Math, Tile, kFilterVectors, kChannelVectors>;
  }
};

}  // namespace

cudaError_t block_sparse_grad_weight(const IgemmGradWeightArgs& args, cudaStream_t stream) {
  return launch_grad_weight<Kernels, true>(args, stream);
}

}  // namespace prunekernels
