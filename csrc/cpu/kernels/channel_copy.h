// Declarations of the kernels in channel_copy.cpp, one per row of the kernel table, and their x86 stand-ins elsewhere.
#pragma once

#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

#define PK_CHANNEL_COPY(operation, element, isa) \
  void operation##_##element##_##isa(const char* from, char* to, int64_t begin, int64_t end, const ChannelList& list);
#include "kernel_table.inc"

}  // namespace prunekernels
