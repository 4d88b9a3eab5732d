#include "core/gpu_architectures.h"

#include <algorithm>

namespace prunekernels {
namespace {

struct Architecture {
  bool ptx = false;
  int major = 0, minor = 0;
  char kind = 0;  // a: that GPU alone; f: its family
};

Architecture parsed(std::string_view name) {
  Architecture found;
  found.ptx = name.substr(0, 7) == "compute";
  int number = 0;
  for (const char letter : name) {
    if (letter >= '0' && letter <= '9') number = 10 * number + (letter - '0');
    if (number && (letter == 'a' || letter == 'f')) found.kind = letter;
  }
  found.major = number / 10, found.minor = number % 10;
  return found;
}

bool runs(const Architecture& a, int major, int minor) {
  const bool same_major = a.major == major;
  if (a.kind == 'a') return same_major && a.minor == minor;
  if (a.ptx && !a.kind && major > a.major) return true;  // the driver compiles it
  return same_major && minor >= a.minor;
}

}  // namespace

std::vector<std::string> architectures_in(std::string_view list) {
  std::vector<std::string> found;
  while (!list.empty()) {
    const size_t end = std::min(list.find(','), list.size());
    if (end > 0) found.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return found;
}

bool runs_on(std::string_view list, int major, int minor) {
  const std::vector<std::string> all = architectures_in(list);
  return all.empty() ||
         std::any_of(all.begin(), all.end(), [&](const std::string& a) { return runs(parsed(a), major, minor); });
}

bool has_architecture(std::string_view list, std::string_view oldest) {
  const Architecture least = parsed(oldest);
  const std::vector<std::string> all = architectures_in(list);
  return std::any_of(all.begin(), all.end(), [&](const std::string& name) {
    const Architecture a = parsed(name);
    return 10 * a.major + a.minor >= 10 * least.major + least.minor;
  });
}

}  // namespace prunekernels
