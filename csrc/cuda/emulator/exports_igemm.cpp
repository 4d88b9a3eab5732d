// Implicit matrix products (forward and input gradient), tile lists, and the choice of loaders and tiles, for ctypes.
#include <algorithm>

#include "core/tile_lists.h"
#include "cuda/emulator/exports_shape.h"
#include "cuda/kernels/igemm.h"

using namespace prunekernels;

extern "C" {

int pk_igemm(bool grad_input, const int64_t* sizes, int element, bool tf32, int tile, const void* operand,
             int64_t from_channels, int64_t from_live, const int32_t* from_index, bool vectors, const void* weight,
             const void* bias, void* result, int64_t to_channels, int64_t to_live, const int32_t* to_index,
             const int32_t* to_slot, const int32_t* list_first, const int32_t* list_chunks, int64_t longest) {
  const IgemmArgs args{shape_of(sizes),
                       static_cast<Element>(element),
                       tf32,
                       static_cast<IgemmTile>(tile),
                       operand,
                       {from_channels, from_live, from_index, nullptr, vectors},
                       weight,
                       bias,
                       result,
                       {to_channels, to_live, to_index, to_slot, false},
                       {list_first, list_chunks, longest}};
  if (list_first) return grad_input ? block_sparse_grad_input(args, nullptr) : block_sparse_fwd(args, nullptr);
  return grad_input ? igemm_grad_input(args, nullptr) : igemm_fwd(args, nullptr);
}

// masks: [K], [K, C], [C]. counts: tiles, chunks listed, longest. share: of all_chunks a tile.
int pk_tile_lists(const bool* filter, const bool* kernel, const bool* input, int64_t K, int64_t C, bool of_filters,
                  int64_t tile, int64_t chunk, int32_t* first, int32_t* chunks, int64_t* counts, int64_t all_chunks,
                  double* share) {
  std::vector<int32_t> table(mask_table_words(K, C, 1));
  build_mask_table(filter, kernel, input, K, C, 1, table.data());
  const MaskTable mask(table.data());
  const TileLists lists = of_filters ? filter_tile_lists(mask, tile, chunk) : channel_tile_lists(mask, tile, chunk);
  counts[0] = lists.tiles(), counts[1] = static_cast<int64_t>(lists.chunks.size()), counts[2] = lists.longest();
  *share = lists.share(all_chunks);
  std::copy(lists.first.begin(), lists.first.end(), first);
  std::copy(lists.chunks.begin(), lists.chunks.end(), chunks);
  return cudaSuccess;
}

int pk_list_is_vectors(const int32_t* index, int64_t live, int64_t channels, int element, bool* vectors) {
  *vectors = list_is_vectors(index, live, channels, static_cast<Element>(element));
  return cudaSuccess;
}

int pk_igemm_serves(const int64_t* sizes, bool* serves) {
  *serves = igemm_serves(shape_of(sizes));
  return cudaSuccess;
}

int pk_igemm_tile(int64_t pixels, int64_t channels, bool vectors, int64_t mask_block, int multiprocessors,
                  bool warpgroups, int* tile) {
  *tile = static_cast<int>(mask_block == 0 ? igemm_tile(pixels, channels, vectors, multiprocessors, warpgroups)
                                           : block_sparse_tile(pixels, channels, vectors, mask_block, multiprocessors));
  return cudaSuccess;
}
}
