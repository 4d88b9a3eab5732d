// The kernel of igemm_fwd and igemm_grad_input for sm_90a: as igemm_core.cuh, but warpgroups multiply, by products that
// run on their own (wgmma) while the same threads load the next chunk.
//
//   step s   the chunk of step s has arrived; its products start; the chunk of step s + 2 is loaded into the stage that
//            the products of step s - 1 have read; the products are waited for
//
// Two blocks of 256 threads share a multiprocessor: one multiplies while the other is between two steps or stores its
// result. A warpgroup owns 64 pixels x 128 channels. A row of a stage is 64 channels, 128 bytes, swizzled as
// wgmma_rows() says; loaders, walk and stores are those of the other tiles.
#pragma once

#include "cuda/kernels/igemm_core.cuh"

namespace prunekernels {

struct WarpgroupTile : BlockTile<128, 128, 8, 1, 2> {
  static constexpr int kDeep = 8, kParts = 1, kStages = 3;
  template <typename T>
  PK_DEVICE static int place(int row, int vector) {
    return (row * kDeep + (vector ^ row % 8)) * kVector<T>;
  }
};

// What compiles for other architectures too has no body there, and is not launched (wgmma_serves() in igemm.h).
#if defined(PK_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T, bool kVectors>
PK_DEVICE void convolve_by_warpgroups(const ConvolveParams& p) {
  using Tile = WarpgroupTile;
  using Layout = ConvolveShared<T, Tile>;
  using Operand = OperandLoader<T, Tile, kVectors>;
  constexpr int kRow = kRowElements<T, Tile>, kSlice = 16;  // elements that one product takes of a row
  const AxisWalk rows = p.rows[blockIdx.y / p.classes[1]], columns = p.columns[blockIdx.y % p.classes[1]];
  const int tile = blockIdx.x % p.tiles, first_filter = tile * Tile::kN;
  const int first_pixel = blockIdx.x / p.tiles * Tile::kM;
  if (first_pixel >= p.images * rows.count * columns.count) return;  // a class smaller than the largest

  const Shared<T> stages(0), result_tile(0);
  const Shared<Pixel> pixels(Layout::kPixels);
  const Shared<int32_t> results(Layout::kResults);
  fill_tables<Tile>(p, rows, columns, first_pixel, pixels, results);
  __syncthreads();

  Sums<16, Tile::kN> sums;  // of the warp: 16 of its warpgroup's rows
  start_sums<T>(p, first_filter, sums);

  Walk<T, false, kVectors, Operand::kOwn, Tile::kDeep> walk(p, rows, columns, tile, Operand::vector(),
                                                            Operand::within());
  Operand operand(pixels);
  const WeightLoader<T, Tile> weight(p, first_filter, Operand::weight_line(), Operand::vector());
  const int steps = walk.steps(rows, columns);
  const int group_rows = warp_id() / 4 * 64 * kRow;

  const auto load = [&](int step, int stage) {
    if (step < steps) {
      const Shared<T> to = stages + stage * Layout::kStage;
      weight.start(p, walk, to + Tile::kM * kRow);
      operand.start(p, walk, to, 0);
      operand.finish(to, 0);
      walk.advance(p, rows, columns, Operand::within());
    }
    cp_async_commit();
  };
  load(0, 0);
  load(1, 1);
  for (int step = 0, stage = 0; step < steps; ++step) {
    cp_async_wait<1>();
    fence_async_proxy();
    __syncthreads();  // this step's chunk has arrived, and the products of the last step have ended
    const Shared<T> from = stages + stage * Layout::kStage;
    const SharedAddress a = from.address(group_rows), b = from.address(Tile::kM * kRow);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < kRow / kSlice; ++slice) {
      constexpr int kBytes = kSlice * sizeof(T);
      wgmma_m64n128k16(sums.at[0], wgmma_rows(a + slice * kBytes), wgmma_rows(b + slice * kBytes), T{});
    }
    wgmma_commit();
    load(step + 2, stage == 0 ? 2 : stage - 1);
    stage = stage == 2 ? 0 : stage + 1;
    wgmma_wait<0>();
  }

  __syncthreads();
  stage_sums<T, Layout::kStorePitch>(sums, result_tile + warp_id() * 16 * Layout::kStorePitch);
  __syncthreads();
  store_tile<T, Tile>(p, first_filter, result_tile, results);
}

#else

template <typename T, bool kVectors>
PK_DEVICE void convolve_by_warpgroups(const ConvolveParams&) {}

#endif

}  // namespace prunekernels
