#include "cpu/kernels/tiles.h"

#include "cpu/kernels/tiles_impl.h"

namespace prunekernels {

#define PK_TILES(isa) TileKernels tile_kernels_##isa();
#include "kernel_table.inc"

TileKernels tile_kernels_scalar() { return Tiles<ScalarFloat>::table(); }

namespace {

struct Row {
  Isa isa;
  const TileKernels& (*kernels)();
};

// Filled in when first asked for: the code that does it may itself need the instruction set.
template <TileKernels (*kMake)()>
const TileKernels& made() {
  static const TileKernels kernels = kMake();
  return kernels;
}

constexpr Row kRows[] = {
#define PK_TILES(isa) {Isa::isa, made<tile_kernels_##isa>},
#include "kernel_table.inc"
};

}  // namespace

const TileKernels& tile_kernels() {
  const Isa allowed = isa();
  const Row* row = kRows;
  while (row->isa > allowed) ++row;  // ends: the last row is scalar
  return row->kernels();
}

}  // namespace prunekernels
