"""How a plan wins the trials, by times that are made up."""

import pytest

import prunekernels as pk
from prunekernels.ops import extension


@pytest.mark.skipif(not pk.has_extension(), reason="without the extension there is one plan only")
class TestTrials:
    def run(self, ms, most=64):
        """By plan, how many runs it got; ms: by plan, its time, or a function of the number of the run."""
        trials = extension._C.PlanTrials(list(ms))
        runs = dict.fromkeys(ms, 0)
        while not trials.settled() and sum(runs.values()) < most:
            plan = trials.next()
            time = ms[plan](runs[plan]) if callable(ms[plan]) else ms[plan]
            trials.add(plan, time)
            runs[plan] += 1
        return trials, runs

    def test_contenders_run_in_turn(self):
        trials = extension._C.PlanTrials(["compact", "direct", "dense"])
        seen = []
        for _ in range(6):
            seen.append(trials.next())
            trials.add(seen[-1], 1.0)
        assert seen == ["compact", "direct", "dense"] * 2 and not trials.settled()

    def test_what_is_far_behind_runs_once_or_twice(self):
        trials, runs = self.run({"compact": 10.0, "direct": 35.0, "dense": 40.0})
        assert trials.settled() and trials.best() == "compact" and runs == {"compact": 2, "direct": 1, "dense": 2}
        assert trials.lead() == pytest.approx(2.5)

    def test_a_short_first_run_decides_nothing(self):
        """It may be set-up: of a primitive, of memory, for dense even of the vendor's library."""
        first_is_slow = {"dense": 0.2, "compact": lambda run: 4.0 if run == 0 else 0.1}
        assert self.run(first_is_slow)[0].best() == "compact"
        assert self.run({"compact": 0.2, "dense": lambda run: 90.0 if run == 0 else 0.1})[0].best() == "dense"

    @pytest.mark.parametrize("first", ["compact", "direct"])
    def test_an_interrupted_first_run_decides_nothing(self, first):
        """Another process may have had the core for its turn, a few milliseconds."""
        times = {"compact": lambda run: 1.0 + 9 * (run == 0), "dense": 2.0, "direct": 2.0}
        order = dict(sorted(times.items(), key=lambda item: item[0] != first))
        assert self.run(order)[0].best() == "compact"

    def test_near_ties_get_more_runs_and_end(self):
        trials, runs = self.run({"compact": 1.0, "direct": 1.01, "dense": 1.2})
        assert trials.settled() and trials.best() == "compact" and runs["compact"] == runs["direct"] == 8
        assert runs["dense"] < 8

    @pytest.mark.parametrize(("ms", "best"), [(0.98, "dense"), (0.96, "compact")])
    def test_dense_wins_ties(self, ms, best):
        assert self.run({"compact": ms, "dense": 1.0})[0].best() == best

    def test_noise_does_not_decide(self):
        """Every other run is disturbed; the best of the runs counts."""
        noisy = {"compact": lambda run: 1.0 + (run % 2), "dense": lambda run: 1.3 + (run % 2 == 0)}
        assert self.run(noisy)[0].best() == "compact"

    def test_the_excess_over_the_best_is_small(self):
        """Of a hundred calls, what trials cost beyond the best plan, where what is far behind nearby is left out."""
        for slow in (1.02, 1.05, 1.1, 1.2, 1.4, 1.6):
            times = {"compact": 10.0, "direct": 10.0 * slow, "dense": 10.0 * slow}
            _, runs = self.run(times)
            assert sum((times[plan] - 10.0) * n for plan, n in runs.items()) / (100 * 10.0) <= 0.035

    def test_one_contender_is_settled(self):
        assert extension._C.PlanTrials(["dense"]).settled()

    def test_unknown_plan(self):
        with pytest.raises(ValueError, match="expected a plan, got fast"):
            extension._C.PlanTrials(["fast"])
