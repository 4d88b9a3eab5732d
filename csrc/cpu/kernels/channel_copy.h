// Declares the kernels of channel_copy.cpp, one for each PK_CHANNEL_COPY row of kernel_table.inc.
#pragma once

#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

#define PK_CHANNEL_COPY(operation, element, isa) \
  void operation##_##element##_##isa(const char* from, char* to, int64_t begin, int64_t end, const ChannelList& list);
#include "kernel_table.inc"

}  // namespace prunekernels
