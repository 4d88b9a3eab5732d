#include "cuda/emulator/traffic.h"

#include <algorithm>
#include <array>
#include <deque>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cuda/emulator/block.h"

namespace prunekernels::simt::traffic {

bool on = false;

namespace {

constexpr uint32_t kSector = 32, kBanks = 32, kBankBytes = 4, kPhaseBytes = kBanks * kBankBytes;

struct Array {
  uintptr_t begin, end;
  std::vector<bool> seen;  // by sector
};

struct Counts {                                         // as pk_traffic_end() gives them, in this order
  int64_t load_requests, load_sectors, loaded_sectors;  // of warps; of all requests; that blocks ask the L2 cache for
  int64_t store_requests, store_sectors;
  int64_t distinct_sectors;  // of the arrays, read or written
  int64_t shared_wavefronts, least_wavefronts;
  int64_t products;
};

struct Place {  // of one lane in shared memory
  uint32_t at, bytes;
  int lane;
};

struct Request {  // of a warp
  bool writes = false;
  std::vector<uint64_t> sectors;
  std::vector<Place> places;
};

std::vector<Array> arrays;
Counts counts;
std::unordered_map<const void*, uint32_t> sites;
std::vector<std::array<uint32_t, kMaxThreads>> visits;  // by site and thread, in this block
std::unordered_map<uint64_t, Request> requests;         // of this block

// A block's share of the L1 cache, first in first out; and what it has asked for past the cache since its last barrier.
constexpr size_t kCachedSectors = 1024;
std::unordered_set<uint64_t> cached, asked;
std::deque<uint64_t> cached_in_order;
Time asked_since;

bool misses(uint64_t sector, bool looks_into_cache) {
  if (asked_since != block.barrier) asked.clear(), asked_since = block.barrier;
  if (!looks_into_cache) return asked.insert(sector).second;
  if (!cached.insert(sector).second) return false;
  cached_in_order.push_back(sector);
  if (cached_in_order.size() > kCachedSectors) {
    cached.erase(cached_in_order.front());
    cached_in_order.pop_front();
  }
  return true;
}

// A vector of 16 bytes may be copied word by word on the host: what a thread does next, right behind a word, is the
// same access.
struct Last {
  Request* request = nullptr;
  uintptr_t end = 0;
};
std::array<Last, kMaxThreads> last;

// The accesses of a warp's lanes at one site belong together if each lane is there for the same time.
Request& request(const void* site) {
  const auto [found, is_new] = sites.try_emplace(site, static_cast<uint32_t>(sites.size()));
  if (is_new) visits.emplace_back();
  const uint64_t visit = visits[found->second][block.self->rank]++;
  return requests[(visit << 32) | (static_cast<uint64_t>(found->second) << 8) | block.self->warp()];
}

// Lanes are served in phases of 128 bytes; in each, a bank gives one word at a time.
void count_wavefronts(const std::vector<Place>& places) {
  const uint32_t bytes = std::max(places.front().bytes, kBankBytes), lanes = kPhaseBytes / bytes;
  for (uint32_t first = 0; first < kLanes; first += lanes) {
    std::array<std::vector<uint32_t>, kBanks> words;
    for (const Place& p : places)
      if (p.lane >= static_cast<int>(first) && p.lane < static_cast<int>(first + lanes))
        for (uint32_t word = p.at / kBankBytes; word <= (p.at + p.bytes - 1) / kBankBytes; ++word) {
          auto& bank = words[word % kBanks];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    counts.shared_wavefronts += static_cast<int64_t>(most), counts.least_wavefronts += most > 0;
  }
}

}  // namespace

void global(const void* at, uint32_t bytes, bool writes, const void* site, bool looks_into_cache) {
  if (!on || !block.self) return;
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (Array& array : arrays) {
    if (address < array.begin || address >= array.end) continue;
    Last& before = last[block.self->rank];
    const uint32_t unit = bytes >= 4 ? 16 : writes ? 4 : 0;  // narrow loads may be of neighbouring channels, one by one
    const bool goes_on = unit && before.request && before.request->writes == writes && before.end == address &&
                         address % unit != 0 && address % unit + bytes <= unit;
    Request& mine = goes_on ? *before.request : request(site);
    mine.writes = writes;
    before = {&mine, address + bytes};
    for (uint64_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector) {
      mine.sectors.push_back(sector);
      array.seen[sector - array.begin / kSector] = true;
      if (!writes) counts.loaded_sectors += misses(sector, looks_into_cache);
    }
    return;
  }
}

void shared(uint32_t at, uint32_t bytes, const void* site) { request(site).places.push_back({at, bytes, lane()}); }

void product() { ++counts.products; }

void read_by_products(uint32_t bytes) {
  counts.shared_wavefronts += bytes / kPhaseBytes, counts.least_wavefronts += bytes / kPhaseBytes;
}

void end_of_block() {
  for (auto& [key, r] : requests) {
    if (!r.places.empty()) count_wavefronts(r.places);
    if (r.sectors.empty()) continue;
    std::sort(r.sectors.begin(), r.sectors.end());
    const auto sectors = std::unique(r.sectors.begin(), r.sectors.end()) - r.sectors.begin();
    ++(r.writes ? counts.store_requests : counts.load_requests);
    (r.writes ? counts.store_sectors : counts.load_sectors) += sectors;
  }
  requests.clear(), cached.clear(), cached_in_order.clear(), asked.clear();
  asked_since = 0;
  last.fill({});
  for (auto& each : visits) each.fill(0);
}

}  // namespace prunekernels::simt::traffic

using namespace prunekernels::simt;

extern "C" {

// Counts accesses to these arrays, and all of shared memory, from here on.
void pk_traffic_begin(const void* const* begins, const int64_t* bytes, int count) {
  traffic::counts = {}, traffic::arrays.clear();
  for (int i = 0; i < count; ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(begins[i]);
    traffic::arrays.push_back({begin, begin + bytes[i], std::vector<bool>(bytes[i] / traffic::kSector + 2)});
  }
  traffic::on = true;
}

void pk_traffic_end(int64_t* counted) {
  traffic::on = false;
  for (const auto& array : traffic::arrays)
    traffic::counts.distinct_sectors += std::count(array.seen.begin(), array.seen.end(), true);
  std::copy_n(&traffic::counts.load_requests, sizeof(traffic::Counts) / sizeof(int64_t), counted);
}

// What -fsanitize=thread calls before each access to memory that is not known to be the thread's own.
#define PK_ACCESS(bytes)                                                                                          \
  void __tsan_read##bytes(void* at) { traffic::global(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { traffic::global(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { traffic::global(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { traffic::global(at, bytes, true, __builtin_return_address(0)); }
PK_ACCESS(1)
PK_ACCESS(2)
PK_ACCESS(4)
PK_ACCESS(8)
PK_ACCESS(16)
#undef PK_ACCESS
void __tsan_read_range(void* at, unsigned long bytes) {
  traffic::global(at, static_cast<uint32_t>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, unsigned long bytes) {
  traffic::global(at, static_cast<uint32_t>(bytes), true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
