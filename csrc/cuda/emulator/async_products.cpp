#include "cuda/emulator/async_products.h"

#include <limits>
#include <vector>

#include "cuda/emulator/block.h"
#include "cuda/emulator/traffic.h"

namespace prunekernels::simt {
namespace {

constexpr int kDepth = 16, kRowBytes = kDepth * 2, kWarpRows = 16, kColumns = 128,
              kSums = kWarpRows * kColumns / kLanes;
constexpr uint32_t kSwizzledRow = 128, kSwizzledRows = 8, kSwizzle128 = 1;
constexpr int kTilesOfProduct = kColumns / 8;  // of m16n8k16

struct Started {
  uint64_t a, b;
  Widen widen;
  int group;
  std::vector<unsigned char> operands;  // as they were when it started
};

struct WarpProducts {
  bool fenced;
  int groups;  // committed
  std::vector<Started> started;
  float* d[kLanes];
  float sums[kLanes][kSums];  // while some are started
};
WarpProducts warps[kMaxThreads / kLanes];

WarpProducts& mine() { return warps[block.self->warp()]; }

// Address of row i of a tile that a descriptor names.
uint32_t row_address(uint64_t descriptor, int row) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;  // from eight rows to the next
  const auto rows = static_cast<uint32_t>(row);
  return start + rows / kSwizzledRows * stride + rows % kSwizzledRows * kSwizzledRow;
}

void check_descriptor(const char* name, uint64_t descriptor) {
  if (descriptor >> 62 != kSwizzle128 || (descriptor >> 49 & 7) != 0)
    fail("%s: descriptor 0x%016llx is not of a tile with 128-byte swizzle and no base offset", name,
         static_cast<unsigned long long>(descriptor));
  const uint32_t start = row_address(descriptor, 0);
  if (start % (kSwizzledRow * kSwizzledRows) >= kSwizzledRow)
    fail("%s: a tile at shared byte %u: its rows do not begin at a multiple of 1024", name, start);
}

// Rows first to first + count of a tile, [count][kDepth]. Bits 4 to 6 of an address are exclusive-ored with bits 7
// to 9.
void read_rows(uint64_t descriptor, int first, int count, unsigned char* to) {
  for (int i = 0; i < count; ++i)
    for (uint32_t chunk = 0; chunk < kRowBytes; chunk += 16) {
      const uint32_t at = row_address(descriptor, first + i) + chunk;
      read_by_product(at ^ (at >> 7 & 7) << 4, to + i * kRowBytes + chunk, 16);
    }
}

std::vector<unsigned char> read_operands(uint64_t a, uint64_t b) {
  std::vector<unsigned char> bytes((kWarpRows + kColumns) * kRowBytes);
  read_rows(a, block.self->warp() % 4 * kWarpRows, kWarpRows, bytes.data());
  read_rows(b, 0, kColumns, bytes.data() + kWarpRows * kRowBytes);
  return bytes;
}

// Sum 4 j + e of lane 4 g + t is row g + 8 (e / 2), column 8 j + 2 t + e % 2.
void multiply(const Started& product, WarpProducts& warp) {
  float values[kWarpRows + kColumns][kDepth];
  for (int row = 0; row < kWarpRows + kColumns; ++row)
    for (int k = 0; k < kDepth; ++k) {
      uint16_t bits;
      std::memcpy(&bits, product.operands.data() + row * kRowBytes + 2 * k, 2);
      values[row][k] = product.widen(bits);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < kSums; ++i) {
      const float* a = values[lane / 4 + 8 * (i % 4 / 2)];
      const float* b = values[kWarpRows + i / 4 * 8 + lane % 4 * 2 + i % 2];
      for (int k = 0; k < kDepth; ++k) warp.sums[lane][i] += a[k] * b[k];
    }
}

struct Start {
  float* d;
  uint64_t a, b;
  Widen widen;
  const char* name;
};

void resolve_start(void* const* lanes, uint32_t) {
  WarpProducts& warp = mine();
  const Start& first = *static_cast<Start*>(lanes[0]);
  for (uint64_t descriptor : {first.a, first.b}) check_descriptor(first.name, descriptor);
  if (warp.started.empty() && !warp.fenced) fail("%s: sums that no wgmma.fence has handed over", first.name);
  for (int i = 0; i < kLanes; ++i) {
    const Start& each = *static_cast<Start*>(lanes[i]);
    if (each.a != first.a || each.b != first.b) fail("%s: lane %d brings other descriptors than lane 0", first.name, i);
    if (warp.started.empty())
      warp.d[i] = each.d, std::memcpy(warp.sums[i], each.d, sizeof(warp.sums[i]));
    else if (warp.d[i] != each.d)
      fail("%s: other sums than those of the products before it, which are not finished", first.name);
    for (int j = 0; j < kSums; ++j) each.d[j] = std::numeric_limits<float>::quiet_NaN();
  }
  warp.started.push_back({first.a, first.b, first.widen, warp.groups, read_operands(first.a, first.b)});
  for (int i = 0; i < kTilesOfProduct; ++i) traffic::product();
  traffic::read_by_products((kWarpRows + kColumns / 4) * kRowBytes);  // a warpgroup reads its columns once
}

void resolve_fence(void* const*, uint32_t) { mine().fenced = true; }
void resolve_commit(void* const*, uint32_t) { ++mine().groups; }

void resolve_wait(void* const* lanes, uint32_t) {
  WarpProducts& warp = mine();
  const int done = warp.groups - *static_cast<int*>(lanes[0]);  // groups of a number below this
  size_t finished = 0;
  while (finished < warp.started.size() && warp.started[finished].group < done) {
    const Started& product = warp.started[finished++];
    if (read_operands(product.a, product.b) != product.operands)
      fail("a product's operands were overwritten before it was waited for");
    multiply(product, warp);
  }
  if (finished == 0) return;
  warp.started.erase(warp.started.begin(), warp.started.begin() + static_cast<std::ptrdiff_t>(finished));
  if (!warp.started.empty()) return;
  for (int i = 0; i < kLanes; ++i) std::memcpy(warp.d[i], warp.sums[i], sizeof(warp.sums[i]));
  warp.fenced = false;
}

}  // namespace

void start_product(const char* name, float* d, uint64_t a, uint64_t b, Widen widen) {
  Start mine{d, a, b, widen, name};
  meet({name, resolve_start, true}, kAllLanes, &mine);
}
void fence_products() { meet({"wgmma.fence", resolve_fence, true}, kAllLanes, nullptr); }
void commit_products() { meet({"wgmma.commit_group", resolve_commit, true}, kAllLanes, nullptr); }
void wait_for_products(int pending) { meet({"wgmma.wait_group", resolve_wait, true}, kAllLanes, &pending); }

void fence_async_proxy() { ++block.self->proxy_fences; }

void begin_products() {
  for (WarpProducts& warp : warps) warp.fenced = false, warp.groups = 0, warp.started.clear();
}

bool are_products_left() {
  for (int w = 0; w < block.warp_count; ++w)
    if (!warps[w].started.empty()) return true;
  return false;
}

}  // namespace prunekernels::simt
