// Kernel masks for the tile kernels: which steps of the reduction a tile of results may skip. Results are cut into
// tiles, operand channels into chunks, both counted in compact positions (the order of the table's lists). A chunk is
// listed for a tile where any kernel between the two is live; dead kernels inside a listed chunk are zero weights.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"

namespace prunekernels {

struct TileLists {
  std::vector<int32_t> first;   // [tiles + 1] tile t lists chunks[first[t]] .. chunks[first[t + 1] - 1]
  std::vector<int32_t> chunks;  // ascending within a tile

  int64_t tiles() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t longest() const;
  // Chunks listed, of the tiles x all chunks there are: what is left of the work.
  double share(int64_t all_chunks) const;
};

// One group only; at least one tile, be it empty. Of filter tiles: chunks of channels (forward, weight gradient).
TileLists filter_tile_lists(const MaskTable& mask, int64_t tile, int64_t chunk);
// Of channel tiles: chunks of filters (input gradient).
TileLists channel_tile_lists(const MaskTable& mask, int64_t tile, int64_t chunk);

}  // namespace prunekernels
