// How the pixel kernels cut results into blocks, and which pairs of operand channels each of them reads: those that any
// of its results does.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tile_lists.h"

namespace prunekernels {

struct ResultBlock {
  int64_t first, count;  // results, 32 at most
  int64_t begin, end;    // in ResultBlocks::pairs
  int64_t run;           // its pairs come in stretches of so many neighbours

  int64_t listed() const { return end - begin; }
  bool half() const { return count <= 16; }
};

struct ResultBlocks {
  std::vector<ResultBlock> blocks;
  std::vector<int32_t> pairs;  // ascending within a block
  double cost;                 // in pairs that 32 results read

  // Between the blocks' results and what they read.
  int64_t kernels(int64_t operands) const {
    int64_t sum = 0;
    for (const ResultBlock& block : blocks)
      sum += block.count * (2 * block.listed() - (block.listed() > 0 && 2 * pairs[block.end - 1] + 1 >= operands));
    return sum;
  }
};

// Every block reads everything.
ResultBlocks whole_blocks(int64_t results, int64_t operands);

// Such that they read few pairs. quads: lists of pairs of operands, for four results each. taps: how often a pair is
// read.
ResultBlocks cut_into_blocks(const TileLists& quads, int64_t results, int64_t operands, int64_t taps);

}  // namespace prunekernels
