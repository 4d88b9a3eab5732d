// The live kernels of a mask as the lists that the sparse CUDA kernels walk; derived from a mask table on the host,
// once per mask, and moved to the device as one int32 array.
//
// Results (forward: filters, input gradient: channels) are computed in blocks of kBlockResults, whatever their group.
// A block walks its steps, one for every operand channel that a live kernel of the block reads, with a bit per result.
// Results are sorted by their number of live kernels, the most first: the results of a block then have about the same
// work, and the longest blocks start first.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"

namespace prunekernels {

constexpr int kBlockResults = 32;

struct SparseStep {
  int32_t operand;         // channel of the operand
  int32_t weight_operand;  // the same, as the weight's axis counts it: within its group if it is an input channel
  uint32_t live;           // bit i: result i of the block reads it
  int32_t unused = 0;      // 16 bytes a step
};

// Weight gradient: a job is a channel and some filters that read it. All jobs of a block belong to one tile of filters
// and have about the same size; the largest come first.
constexpr int kJobFilters = 8;
constexpr int kBlockJobs = 32;
constexpr int kBlockFilters = 32;

struct SparseJob {
  int32_t channel;
  int32_t filters;              // how many; 0: this job is empty, and so are all after it
  uint8_t filter[kJobFilters];  // places in the block's
  int32_t pair[kJobFilters];    // places among the live pairs, filter after filter
};

struct SparseJobs {  // of a block
  int32_t filters, jobs;
  int32_t filter[kBlockFilters];
  SparseJob job[kBlockJobs];
};

// Where things are in SparseLists::words().
struct ResultLists {
  int64_t blocks;  // ceil(results / kBlockResults)
  int64_t order;   // [results]     every result once; ~result if it is dead: zeros, bias or not
  int64_t begin;   // [blocks + 1]  first step of each block
  int64_t steps;   // [begin[blocks]] of SparseStep
};

struct JobLists {
  int64_t blocks, live_pairs;
  int64_t jobs;  // [blocks] of SparseJobs
  int64_t rank;  // [K, ceil(C / G / 32)]  live pairs before those of this word of the mask table's pairs
};

struct LivePair {
  int32_t filter, channel, channel_in_group;
};

class SparseLists {
 public:
  explicit SparseLists(const MaskTable& mask);

  const std::vector<int32_t>& words() const { return words_; }  // to be copied to the device, 16-byte aligned
  const ResultLists& forward() const { return forward_; }
  const ResultLists& grad_input() const { return grad_input_; }
  const JobLists& grad_weight() const { return grad_weight_; }

 private:
  ResultLists add_results(const std::vector<LivePair>& pairs, const MaskTable& mask, bool forward);
  JobLists add_jobs(const std::vector<LivePair>& pairs, const MaskTable& mask);
  template <typename T>
  int64_t append(const std::vector<T>& items);

  std::vector<int32_t> words_;
  ResultLists forward_, grad_input_;
  JobLists grad_weight_;
};

}  // namespace prunekernels
