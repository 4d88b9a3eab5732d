#include "plan/plan_choice.h"

#include <ATen/Context.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

namespace prunekernels {
namespace {

constexpr double kFarBehind = 3;       // times the model's best: not worth measuring
constexpr double kDenseFarBehind = 8;  // dense is measured almost always: no plan may be slower, and the model errs
constexpr double kHopeless = 2;        // times the best first run: not worth a second ...
constexpr double kShortMs = 5;         // ... unless it is short, where a first run is mostly set-up
constexpr double kTie = 0.97;          // dense wins unless another plan takes less than this share of its time
constexpr int kLeastRounds = 2, kMostRounds = 16;

Plan modelled(const PlanDevice& device, const PlanCase& c) {
  Plan best = Plan::dense;
  double least = almost_full(c.mask) ? 0 : device.cost(Plan::dense, c) * kMargin;
  for (Plan plan : kPlans)
    if (plan != Plan::dense && device.serves(plan, c) && device.cost(plan, c) < least)
      best = plan, least = device.cost(plan, c);
  return best;
}

// Whether the choice may rest on measurements, known ones or new ones.
bool follows_measurements(const PlanRequest& asked, const PlanCase& c) {
  const bool settled = almost_full(c.mask) && !c.mask.nothing_dead();
  return asked.may_measure && !settled && !at::globalContext().deterministicAlgorithms();
}

struct Trial {
  Plan plan;
  double ms;  // of the fastest run
};

std::vector<Trial> candidates(const PlanDevice& device, const PlanCase& c) {
  double least = std::numeric_limits<double>::infinity();
  for (Plan plan : kPlans)
    if (device.serves(plan, c)) least = std::min(least, device.cost(plan, c));
  std::vector<Trial> trials;
  for (Plan plan : kPlans)
    if (device.serves(plan, c) && device.cost(plan, c) <= (plan == Plan::dense ? kDenseFarBehind : kFarBehind) * least)
      trials.push_back({plan, 0});
  return trials;
}

// Dense stays a candidate however long its first run takes: that run also pays for the vendor library's start-up, and
// no plan may be slower than dense.
void time_each(const PlanDevice& device, std::vector<Trial>& trials, c10::function_ref<at::Tensor(Plan)> run) {
  const auto milliseconds = [&](const Trial& t) { return device.milliseconds([&] { run(t.plan); }); };
  double best = std::numeric_limits<double>::infinity(), spent = 0;
  for (Trial& t : trials) {
    t.ms = milliseconds(t);
    best = std::min(best, t.ms);
  }
  const double hopeless = std::max(kShortMs, kHopeless * best);
  std::vector<Trial*> contenders;
  for (Trial& t : trials)
    if (t.plan == Plan::dense || t.ms <= hopeless) contenders.push_back(&t);
  for (int round = 0; round < kLeastRounds || (round < kMostRounds && spent < kShortMs); ++round)
    for (Trial* t : contenders) {
      const double ms = milliseconds(*t);
      t->ms = std::min(t->ms, ms), spent += ms;
    }
}

const Trial& fastest(const std::vector<Trial>& trials) {
  const auto handicapped = [](const Trial& t) { return t.plan == Plan::dense ? t.ms * kTie : t.ms; };
  return *std::min_element(trials.begin(), trials.end(),
                           [&](const Trial& a, const Trial& b) { return handicapped(a) < handicapped(b); });
}

// Results are freed before the next candidate is timed: they may be large.
Plan measure(const PlanDevice& device, const PlanKey& key, std::vector<Trial> trials,
             c10::function_ref<at::Tensor(Plan)> run) {
  static std::mutex one_at_a_time;  // measurements at the same time would disturb each other
  const std::lock_guard lock(one_at_a_time);
  if (const auto known = plan_cache::find(key)) return *known;
  time_each(device, trials, run);
  const Trial& winner = fastest(trials);
  Measured measured{winner.plan, {}};
  measured.ms.fill(std::numeric_limits<double>::quiet_NaN());
  for (const Trial& t : trials) measured.ms[static_cast<int>(t.plan)] = t.ms;
  plan_cache::keep(key, measured);
  return winner.plan;
}

}  // namespace

PlanKey plan_key(const PlanDevice& device, const PlanCase& c) {
  const ConvShape& s = c.shape;
  const MaskTable& m = c.mask;
  const auto word = [](int64_t value) { return static_cast<int32_t>(value); };
  const auto sixteenths = [&](int64_t live, int64_t of) {
    return word((live * 16 + of - 1) / std::max<int64_t>(1, of));
  };
  PlanKey key{};
  key.direction = c.direction;
  key.dtype = word(static_cast<int64_t>(c.dtype)), key.format = word(static_cast<int64_t>(c.format));
  device.describe(c, key);
  key.N = word(s.N), key.C = word(s.C), key.H = word(s.H), key.W = word(s.W);
  key.K = word(s.K), key.R = word(s.R), key.S = word(s.S), key.G = word(s.G);
  for (int i = 0; i < 2; ++i) {
    key.stride[i] = word(s.stride[i]);
    key.padding[i] = word(s.padding[i]);
    key.dilation[i] = word(s.dilation[i]);
  }
  key.live_filters = sixteenths(m.out_count(), s.K);
  key.live_inputs = sixteenths(m.in_count(), s.C);
  key.live_kernels = sixteenths(m[kLivePairs], m.out_count() * m[kInPerGroup]);
  return key;
}

Plan planned(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c) {
  if (asked.forced && device.serves(*asked.forced, c)) return *asked.forced;
  if (follows_measurements(asked, c))
    if (const auto known = plan_cache::find(plan_key(device, c))) return *known;
  return modelled(device, c);
}

at::Tensor with_plan(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c,
                     c10::function_ref<at::Tensor(Plan)> run) {
  if (asked.forced && device.serves(*asked.forced, c)) return run(*asked.forced);
  if (!follows_measurements(asked, c)) return run(modelled(device, c));
  const PlanKey key = plan_key(device, c);
  if (const auto known = plan_cache::find(key)) return run(*known);
  std::vector<Trial> trials = candidates(device, c);
  if (trials.size() == 1 || plan_cache::full() || !device.can_measure()) return run(modelled(device, c));
  return run(measure(device, key, std::move(trials), run));
}

}  // namespace prunekernels
