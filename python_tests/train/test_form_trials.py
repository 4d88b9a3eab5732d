"""Which form of a step is the fastest, by times that are made up."""

import pytest

from prunekernels.train.form_trials import FormTrials, likeliest_first


def run(ms, most=200):
    """Steps by form; ms: by form its time, or a function of the step of the whole trial."""
    trials = FormTrials(list(ms))
    steps = []
    while not trials.settled and len(steps) < most:
        form = trials.now
        steps.append(form)
        trials.add(ms[form](len(steps)) if callable(ms[form]) else ms[form])
    return trials, steps


def test_each_form_gets_a_stretch_and_the_close_ones_more():
    trials, steps = run({"masked": 10.0, "live": 9.0, "compacted": 30.0})
    assert steps[:10] == ["masked"] * 4 + ["live"] * 4 + ["compacted"] * 2  # left at its second step
    assert steps[10:] == (["masked"] * 4 + ["live"] * 4) * 2
    assert trials.best == trials.now == "live" and trials.ms == {"masked": 10.0, "live": 9.0, "compacted": 30.0}


def test_what_is_clearly_behind_gets_one_stretch():
    trials, steps = run({"masked": 16.0, "live": 10.0})
    assert steps == ["masked"] * 4 + ["live"] * 4 and trials.best == "live"


def test_the_first_step_of_a_stretch_does_not_count():
    trials, _ = run({"masked": lambda step: 100.0 if step == 1 else 5.0, "live": 7.6})
    assert trials.best == "masked" and trials.ms["masked"] == 5.0


def test_a_form_that_is_hopeless_gets_one_step():
    trials, steps = run({"live": 10.0, "fp32": 90.0})
    assert steps == ["live"] * 4 + ["fp32"] and trials.best == "live"


def test_a_restart_begins_the_stretch_anew():
    trials = FormTrials(["masked", "live"])
    for ms in (9.0, 5.0):
        trials.add(ms)
    trials.restart()
    trials.add(1.0)  # the first step behind other masks
    assert trials.ms == {"masked": 5.0} and trials.now == "masked"


def test_a_form_that_cannot_run_is_dropped():
    trials = FormTrials(["compacted", "masked", "live"])
    trials.drop("it has a forward of its own")
    assert trials.now == "masked" and trials.reasons == {"compacted": "it has a forward of its own"}
    for _ in range(4):
        trials.add(4.0)
    assert trials.now == "live"
    trials.drop("nor this")
    assert trials.settled and trials.best == trials.now == "masked"


def test_the_last_form_that_is_dropped():
    trials = FormTrials(["masked", "compacted"])
    for _ in range(4):
        trials.add(4.0)
    trials.drop("why not")
    assert trials.settled and trials.now == "masked"


def test_one_form_is_settled():
    assert FormTrials(["masked"]).settled and FormTrials(["masked"]).now == "masked"


@pytest.mark.parametrize("slow", [1.02, 1.1, 1.3, 1.6, 2.5, 10.0])
def test_the_excess_over_the_best_form_is_small(slow):
    """In steps of the best form, where three forms are slower."""
    ms = {"masked bf16": slow, "live bf16": 1.0, "masked fp32": slow, "live fp32": slow}
    trials, steps = run(ms)
    excess = sum(ms[form] - 1.0 for form in steps)
    assert trials.best == "live bf16" and excess <= (max(9, 12 * (slow - 1)) if slow < 3 else 6 * (slow - 1) + 3)


def test_likeliest_first():
    forms = ["masked", "live", "compacted"]
    assert likeliest_first(forms, []) == forms
    all_live = {"masked": 3.0, "live": 1.0}
    assert likeliest_first(forms, [all_live]) == ["live", "compacted"]  # not tried there: it may be
    fewer = {"live": 1.3, "compacted": 1.0}
    assert likeliest_first(forms, [fewer, all_live]) == ["compacted", "live"]  # the nearest first, but it has no masked
    assert likeliest_first(forms, [{"masked": 1.2, "live": 1.4, "compacted": 1.0}]) == ["compacted", "masked", "live"]
    assert likeliest_first(["masked"], [{"masked": 2.0, "live": 1.0}]) == ["masked"]


def run_with(variants, ms):
    trials, steps = FormTrials([form for form in ms if form not in variants.values()], variants), []
    while not trials.settled:
        steps.append(trials.now)
        trials.add(ms[trials.now])
    return trials, steps


def test_variants_of_contenders_get_a_stretch():
    ms = {"masked": 20.0, "live": 10.0, "masked nhwc": 1.0, "live nhwc": 8.0}
    trials, steps = run_with({"masked": "masked nhwc", "live": "live nhwc"}, ms)
    assert steps == ["masked"] * 4 + ["live"] * 8 + ["live nhwc"] * 4 and trials.best == "live nhwc"
    trials, steps = run_with({"live": "live nhwc"}, ms | {"live nhwc": 30.0})
    assert "masked nhwc" not in steps[:8] and trials.best == "masked nhwc"


def test_the_variant_of_a_form_alone():
    trials, steps = run_with({"live": "live nhwc"}, {"live": 3.0, "live nhwc": 90.0})
    assert steps == ["live"] * 8 + ["live nhwc"] and trials.best == "live"
    trials, _ = run_with({"live": "live nhwc"}, {"live": 3.0, "live nhwc": 2.0})
    assert trials.best == "live nhwc" and trials.settled
