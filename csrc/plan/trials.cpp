#include "plan/trials.h"

#include <algorithm>

namespace prunekernels {
namespace {

constexpr double kTie = 0.97;     // dense wins unless another plan takes less than this share of its time
constexpr double kHopeless = 2;   // times the best: a longer first run is the last
constexpr double kPauseMs = 10;   // what set-up, or another process on the core, may have added to a first run
constexpr int32_t kMostRuns = 8;  // of each contender
constexpr double kNoiseMs = 0.1;  // an interruption; what is slower by less in its first half of runs has not lost yet

// By how much the best of so many runs may be above the best of all: noise is assumed to be less. 0.5, 0.25, ... 0.06.
double slack(int32_t runs) {
  double share = 1;
  for (int32_t run = 1; run < runs && share > 0.06; ++run) share /= 2;
  return share;
}

double handicapped(const Trial& t) { return t.plan == Plan::dense ? t.ms * kTie : t.ms; }

}  // namespace

Trials::Trials(const std::vector<Plan>& contenders) {
  for (Plan plan : contenders) trials_.push_back({plan});
}

double Trials::least() const {
  double ms = std::numeric_limits<double>::infinity();
  for (const Trial& t : trials_) ms = std::min(ms, t.ms);
  return ms;
}

Plan Trials::next() const {
  const Trial* turn = nullptr;
  for (const Trial& t : trials_)
    if (!t.out && (!turn || t.runs < turn->runs)) turn = &t;
  return turn ? turn->plan : Plan::dense;
}

// The first run of any plan may pay for set-up, dense's even for the vendor library's.
void Trials::add(Plan plan, double ms) {
  for (Trial& t : trials_)
    if (t.plan == plan) t.ms = std::min(t.ms, ms), ++t.runs;
  const double best = least();
  for (Trial& t : trials_) {
    if (t.runs == 1 && t.plan != Plan::dense) t.out |= t.ms - kPauseMs > kHopeless * best;
    if (t.runs >= 2 && (t.ms > best + kNoiseMs || 2 * t.runs >= kMostRuns)) t.out |= t.ms > best * (1 + slack(t.runs));
  }
}

bool Trials::settled() const {
  int64_t left = 0;
  bool is_tried = true;
  for (const Trial& t : trials_)
    if (!t.out) ++left, is_tried &= t.runs >= kMostRuns;
  return left <= 1 || is_tried;
}

Plan Trials::best() const {
  const auto first = [](const Trial& a, const Trial& b) { return handicapped(a) < handicapped(b); };
  const auto found = std::min_element(trials_.begin(), trials_.end(), first);
  return found == trials_.end() ? Plan::dense : found->plan;
}

double Trials::lead() const {
  const Plan winner = best();
  double ms = 0, second = std::numeric_limits<double>::infinity();
  for (const Trial& t : trials_)
    if (t.plan == winner)
      ms = t.ms;
    else
      second = std::min(second, t.ms);
  return second / ms - 1;
}

bool Trials::begun() const {
  return std::any_of(trials_.begin(), trials_.end(), [](const Trial& t) { return t.runs > 0; });
}

double Trials::relative(Plan plan) const {
  for (const Trial& t : trials_)
    if (t.plan == plan && t.runs) return t.ms / least();
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace prunekernels
