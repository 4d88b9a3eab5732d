#include "cuda/kernels/igemm.h"
#include "cuda/kernels/igemm_launch.cuh"

namespace prunekernels {
namespace {

template <typename Math, typename Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) igemm_grad_input_kernel(const ConvolveParams p) {
  convolve<Math, Tile, kVectors, false>(p);
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(WarpgroupTile::kThreads, WarpgroupTile::kBlocks)
    igemm_grad_input_warpgroup_kernel(const ConvolveParams p) {
  convolve_by_warpgroups<T, kVectors>(p);
}

struct Kernels {
  template <typename Math, typename Tile, bool kVectors>
  static auto kernel() {
    if constexpr (std::is_same_v<Tile, WarpgroupTile>)
      return igemm_grad_input_warpgroup_kernel<Math, kVectors>;
    else
      return igemm_grad_input_kernel<Math, Tile, kVectors>;
  }
};

}  // namespace

cudaError_t igemm_grad_input(const IgemmArgs& args, cudaStream_t stream) {
  return launch_convolution<Kernels, false>(args, true, stream);
}

}  // namespace prunekernels
