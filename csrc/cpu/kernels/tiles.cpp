#include "cpu/kernels/tiles.h"

#include "cpu/kernels/tiles_impl.h"

namespace prunekernels {

#if defined(__x86_64__)
TileKernels tile_kernels_avx512();
TileKernels tile_kernels_avx2();
#endif

const TileKernels& tile_kernels() {
  static const TileKernels scalar = Tiles<ScalarFloat>::table(Isa::scalar);
#if defined(__x86_64__)
  static const TileKernels avx2 = tile_kernels_avx2(), avx512 = tile_kernels_avx512();
  if (isa() >= Isa::avx512) return avx512;
  if (isa() >= Isa::avx2) return avx2;
#endif
  return scalar;
}

}  // namespace prunekernels
