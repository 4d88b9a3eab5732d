#include "cpu/kernels/microkernels.h"

#include "cpu/kernels/isa_dispatch.h"
#include "cpu/kernels/microkernels_impl.h"

namespace prunekernels {

#define PK_TILES(isa) TileKernels tile_kernels_##isa();
#include "kernel_table.inc"

TileKernels tile_kernels_scalar() { return Tiles<ScalarFloat>::table(); }

const TileKernels& tile_kernels() {
  static constexpr ByIsa<TileKernels> rows[] = {
#define PK_TILES(isa) {Isa::isa, made<Isa::isa, tile_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
