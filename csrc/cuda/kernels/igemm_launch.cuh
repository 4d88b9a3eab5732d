// Launches the instance of a kernel that IgemmArgs ask for: element type, tile, loader.
#pragma once

#include "cuda/kernels/igemm_warpgroup.cuh"

namespace prunekernels {

using LargeTile = BlockTile<128, 128, 2, 4, 2>;
using MediumTile = BlockTile<128, 64, 2, 2, 4>;
using SmallTile = BlockTile<64, 32, 2, 2, 4>;

// Fills the parameters, but for `tiles`. cudaErrorInvalidValue: not served, or a misaligned weight.
cudaError_t convolve_params(const IgemmArgs& args, bool grad_input, bool listed, ConvolveParams* params);
// Whether the vector loader serves: the list consists of vectors, and pixels begin at multiples of 16 bytes.
bool loads_vectors(const void* data, const ChannelView& view, Element element);

// visit(Math{}) for the element type, or Tf32.
template <typename Visit>
cudaError_t with_math(Element element, bool tf32, Visit visit) {
  return tf32 && element == Element::f32 ? visit(Tf32{}) : with_element(element, visit);
}

// visit(BlockTile{}). There is no large tile with lists, and none of warpgroups for floats.
template <bool kListed, typename Math, typename Visit>
cudaError_t with_tile(IgemmTile tile, Visit visit) {
  if (tile == IgemmTile::w128n128) {
    if constexpr (kListed || sizeof(Storage<Math>) != 2)
      return cudaErrorInvalidValue;
    else
      return visit(WarpgroupTile{});
  }
  if (tile == IgemmTile::m64n32) return visit(SmallTile{});
  if (tile == IgemmTile::m128n64) return visit(MediumTile{});
  if constexpr (kListed)
    return cudaErrorInvalidValue;
  else
    return visit(LargeTile{});
}

template <typename Kernels, typename Math, typename Tile>
cudaError_t launch_convolve(ConvolveParams p, bool vectors, cudaStream_t stream) {
  p.tiles = p.to_live <= Tile::kN ? 1 : (p.to_live + Tile::kN - 1) / Tile::kN;
  int64_t pixels = 0;  // of the largest class
  for (int r = 0; r < p.classes[0]; ++r)
    for (int c = 0; c < p.classes[1]; ++c) {
      const int64_t count = static_cast<int64_t>(p.images) * p.rows[r].count * p.columns[c].count;
      pixels = count > pixels ? count : pixels;
    }
  const int64_t blocks = (pixels + Tile::kM - 1) / Tile::kM * p.tiles;
  if (blocks == 0 || p.result_channels == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks), p.classes[0] * p.classes[1]), dim3(Tile::kThreads),
                          ConvolveShared<Storage<Math>, Tile>::kBytes};
  return launch(vectors ? Kernels::template kernel<Math, Tile, true>() : Kernels::template kernel<Math, Tile, false>(),
                shape, stream, p);
}

// Kernels::kernel<Math, Tile, kVectors>() is the kernel to launch.
template <typename Kernels, bool kListed>
cudaError_t launch_convolution(const IgemmArgs& args, bool grad_input, cudaStream_t stream) {
  ConvolveParams params;
  const cudaError_t status = convolve_params(args, grad_input, kListed, &params);
  if (status != cudaSuccess) return status;
  const bool vectors = loads_vectors(args.operand, args.from, args.element);
  return with_math(args.element, args.tf32, [&](auto math) {
    return with_tile<kListed, decltype(math)>(args.tile, [&](auto tile) {
      return launch_convolve<Kernels, decltype(math), decltype(tile)>(params, vectors, stream);
    });
  });
}

}  // namespace prunekernels
