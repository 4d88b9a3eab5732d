// Launches the instance of a kernel that IgemmGradWeightArgs ask for: element type, tile, loaders.
#pragma once

#include "cuda/kernels/igemm_grad_core.cuh"
#include "cuda/kernels/igemm_launch.cuh"

namespace prunekernels {

// In tf32 each fragment is rounded by each warp that reads it: four warps of 64 x 64 sums do with two thirds of the
// fragments that eight of 64 x 32 need.
template <typename Math>
using LargeGradTile = BlockTile<128, 128, 2, std::is_same_v<Math, Tf32> ? 2 : 4, 2>;
using SmallGradTile = BlockTile<64, 64, 2, 2, 4>;

cudaError_t grad_weight_params(const IgemmGradWeightArgs& args, bool listed, GradWeightParams* params);

// Kernels::kernel<Math, Tile, kFilterVectors, kChannelVectors>() is the kernel to launch.
template <typename Kernels, typename Math, typename Tile>
cudaError_t launch_grad_weight(GradWeightParams p, const IgemmGradWeightArgs& args, bool listed, cudaStream_t stream) {
  using T = Storage<Math>;
  const int64_t pixels = static_cast<int64_t>(p.images) * p.out_rows * p.out_columns;
  if (pixels == 0) p.images = 0, p.out_rows = p.out_columns = 1;  // the walk divides by them
  p.chunks = static_cast<int32_t>((pixels + kChunk<T> - 1) / kChunk<T>);
  p.chunk_images = kChunk<T> / (p.out_rows * p.out_columns);
  p.chunk_rows = kChunk<T> % (p.out_rows * p.out_columns) / p.out_columns;
  p.chunk_columns = kChunk<T> % p.out_columns;
  const int64_t vectors = listed ? args.lists.longest : (args.channels.live + kVector<T> - 1) / kVector<T>;
  const int64_t columns = (vectors * p.kernel_taps * kVector<T> + Tile::kN - 1) / Tile::kN;
  const int64_t filter_tiles = (args.filters.live + Tile::kM - 1) / Tile::kM;
  if (columns == 0 || filter_tiles == 0) return cudaSuccess;
  if (filter_tiles > 65535 || args.splits > 65535) return cudaErrorInvalidValue;
  const LaunchShape shape{
      dim3(static_cast<unsigned>(columns), static_cast<unsigned>(filter_tiles), static_cast<unsigned>(args.splits)),
      dim3(Tile::kThreads), GradShared<T, Tile>::kBytes};
  const bool filter_vectors = loads_vectors(args.grad_out, args.filters, args.element);
  const bool channel_vectors = loads_vectors(args.x, args.channels, args.element);
  const auto kernel = filter_vectors    ? channel_vectors ? Kernels::template kernel<Math, Tile, true, true>()
                                                          : Kernels::template kernel<Math, Tile, true, false>()
                      : channel_vectors ? Kernels::template kernel<Math, Tile, false, true>()
                                        : Kernels::template kernel<Math, Tile, false, false>();
  return launch(kernel, shape, stream, p);
}

template <typename Kernels, bool kListed>
cudaError_t launch_grad_weight(const IgemmGradWeightArgs& args, cudaStream_t stream) {
  GradWeightParams params;
  const cudaError_t status = grad_weight_params(args, kListed, &params);
  if (status != cudaSuccess) return status;
  return with_math(args.element, args.tf32, [&](auto math) {
    using Math = decltype(math);
    return args.tile == GradWeightTile::m64n64
               ? launch_grad_weight<Kernels, Math, SmallGradTile>(params, args, kListed, stream)
               : launch_grad_weight<Kernels, Math, LargeGradTile<Math>>(params, args, kListed, stream);
  });
}

}  // namespace prunekernels
