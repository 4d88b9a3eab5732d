#include "cpu/kernels/gather_scatter.h"

#include <cstring>

#include "cpu/kernels/channel_copy.h"
#include "cpu/kernels/isa.h"

namespace prunekernels {

void gather_planes(const char* full, char* compact, int64_t plane_bytes, int64_t begin, int64_t end,
                   const ChannelList& list) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / list.live, c = list.index[i % list.live];
    char* to = compact + i * plane_bytes;
    if (c < 0)
      std::memset(to, 0, plane_bytes);
    else
      std::memcpy(to, full + (n * list.channels + c) * plane_bytes, plane_bytes);
  }
}

void scatter_planes(const char* compact, char* full, int64_t plane_bytes, int64_t begin, int64_t end,
                    const ChannelList& list) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / list.channels, j = list.slot[i % list.channels];
    char* to = full + i * plane_bytes;
    if (j < 0)
      std::memset(to, 0, plane_bytes);
    else
      std::memcpy(to, compact + (n * list.live + j) * plane_bytes, plane_bytes);
  }
}

namespace {

enum class Operation { gather_pixels, scatter_pixels };
enum class Element { b16 = 2, b32 = 4, b64 = 8 };

struct Row {
  Operation operation;
  Element element;
  Isa isa;
  PixelCopy run;
};

constexpr Row kRows[] = {
#define PK_CHANNEL_COPY(operation, element, isa)     \
  {Operation::operation, Element::element, Isa::isa, \
   Isa::isa <= kBestCompiled ? operation##_##element##_##isa : nullptr},
#include "kernel_table.inc"
};

// Lists with padding have no bit form, and only the scalar kernels read the index.
PixelCopy pick(Operation operation, int64_t element_bytes, const ChannelList& list) {
  const Isa allowed = list.bits ? isa() : Isa::scalar;
  for (const Row& row : kRows)
    if (row.operation == operation && static_cast<int64_t>(row.element) == element_bytes && row.isa <= allowed)
      return row.run;
  return nullptr;
}

}  // namespace

PixelCopy pick_gather_pixels(int64_t element_bytes, const ChannelList& list) {
  return pick(Operation::gather_pixels, element_bytes, list);
}

PixelCopy pick_scatter_pixels(int64_t element_bytes, const ChannelList& list) {
  return pick(Operation::scatter_pixels, element_bytes, list);
}

}  // namespace prunekernels
