// AMX, as far as the kernels use it: eight tiles of up to 16 rows of 64 bytes. Kernels are written over a class Tiles
// with these static functions; AmxInstructions (amx.cpp) and AmxModel (amx_model.cpp) are two.
//   configure(config)         sizes of the tiles; zeroes them
//   release()                 no tile has a size
//   load<t>(from, stride)     tile t = rows at from, from + stride bytes, ...
//   store<t>(to, stride)
//   dot<c, a, b>()            c[m][n] += sum over pairs k of a[m][k] . b[k][n], of bfloat16
//   narrow<vectors>(sums, lanes, y)  16 * vectors floats to bfloat16, zeros where lanes has no bit
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;  // of palette 1

struct alignas(64) TileConfig {  // as the instructions want it in memory
  uint8_t palette, start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[kTiles];
  uint8_t reserved_tiles[16];
  uint8_t rows[kTiles];
  uint8_t reserved_rows[8];
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace prunekernels
