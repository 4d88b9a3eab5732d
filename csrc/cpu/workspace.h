// Memory an operator works in: kept by the thread between calls, since new pages cost more than what is done in them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace prunekernels {

class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    const size_t wanted = static_cast<size_t>(floats) * sizeof(float);
    std::vector<Block>& kept = pool().blocks;
    auto best = kept.end();
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (it->bytes >= wanted && (best == kept.end() || it->bytes < best->bytes)) best = it;
    if (best != kept.end()) {
      block_ = *best;
      kept.erase(best);
    } else {
      if (!kept.empty()) {  // one that is too small makes room
        std::free(kept.back().data);
        kept.pop_back();
      }
      const size_t alignment = wanted < kHuge / 2 ? kAlignment : kHuge;
#if defined(__SANITIZE_ADDRESS__)
      block_.bytes = wanted;
      if (posix_memalign(&block_.data, alignment, wanted)) throw std::bad_alloc();
#else
      block_.bytes = (wanted + alignment) / alignment * alignment;
      block_.data = std::aligned_alloc(alignment, block_.bytes);
      if (!block_.data) throw std::bad_alloc();
#endif
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (alignment == kHuge) madvise(block_.data, block_.bytes, MADV_HUGEPAGE);
#endif
    }
  }
  ~Workspace() {
    if (block_.bytes <= kKeep && pool().blocks.size() < kBlocks)
      pool().blocks.push_back(block_);
    else
      std::free(block_.data);
  }
  Workspace(const Workspace&) = delete;

  float* data() const { return static_cast<float*>(block_.data); }

 private:
  static constexpr size_t kAlignment = 64, kHuge = 2 << 20, kKeep = 16 << 20;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBlocks = 0;  // no second use and no slack, in which an overrun would not show
#else
  static constexpr size_t kBlocks = 3;
#endif
  struct Block {
    void* data;
    size_t bytes;
  };
  struct Pool {
    std::vector<Block> blocks;
    ~Pool() {
      for (const Block& b : blocks) std::free(b.data);
    }
  };
  static Pool& pool() {
    static thread_local Pool pool;
    return pool;
  }

  Block block_{};
};

}  // namespace prunekernels
