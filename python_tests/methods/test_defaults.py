"""What keywords are where the caller leaves them open."""

import abc
import inspect

import pytest
import torch

from cases.methods import chain, sgd
from prunekernels.methods import ASFP, ASRFP, GHFP, PGP, SFP, SRFP, Method, PruneWhileTraining, criteria, schedules

IMAGES = torch.randn(2, 3, 6, 6)


class Tuned(GHFP):
    """Tells what its constructor got."""

    @classmethod
    def tuned(cls, epochs):
        return super().tuned(epochs) | {"fine_tune": epochs // 4, "alpha": 0.25, "clip": False}


def made(cls=Tuned, *args, **options):
    net = chain()
    return cls(net, sgd(net), *args, **options)


def found(method):
    return method.epochs, method.alpha, method.clip is not None


def test_below_duty_1_the_tuned_values_apply():
    assert found(made(epochs=8, duty=0.5)) == (6, 0.25, False)
    assert found(made(Tuned, 0.5, 12, duty=0)) == (9, 0.25, False)
    assert found(made(epochs=8, duty=0.5, alpha=None)) == (6, 0.25, False)


def test_at_duty_1_the_papers_apply():
    assert found(made(epochs=8)) == found(made(epochs=8, duty=1)) == (8, 0.0, False)


def test_what_is_given_stays():
    assert found(made(epochs=8, duty=0.5, fine_tune=1, alpha=0.0, clip=True)) == (7, 0.0, True)


def test_a_preset_stands_for_the_paper_whatever_the_duty():
    method = made(epochs=8, preset="paper")
    assert (*found(method), method.duty, method.preset) == (8, 0.0, False, 1, "paper")
    method = made(epochs=8, duty=0.5, preset="paper")
    assert (*found(method), method.duty) == (8, 0.0, False, 0.5)
    assert made(PGP, epochs=9, preset="paper", example_input=IMAGES).epochs == 3  # its own fine_tune


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": "x"}, {"duty": "x"}, {"duty": 2}])
def test_wrong_values_reach_the_constructors_check(options):
    with pytest.raises(ValueError, match=f"Tuned: {next(iter(options))}: expected"):
        made(**{"epochs": 4, "duty": 0.5, **options})


def test_unknown_keywords_are_refused_by_the_constructor():
    with pytest.raises(TypeError, match="fine_tuning"):
        made(epochs=4, duty=0.5, fine_tuning=1)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="SFP: preset: expected paper or None, got 'mine'"):
        made(SFP, epochs=4, preset="mine")


def test_a_class_may_have_abstract_parents_and_a_signature_of_its_own():
    class Mine(SFP, abc.ABC):
        def __init__(self, model, optimizer):
            super().__init__(model, optimizer, 0.5, 4, duty=0.5)

    assert list(inspect.signature(Mine).parameters) == ["model", "optimizer"]
    assert made(Mine).duty == 0.5
    assert "preset" in inspect.signature(Method).parameters


def test_a_class_gets_what_it_takes():
    class Mine(Tuned):
        def __init__(self, model, optimizer, *, duty=0.5, epochs=8, fine_tune=None):
            super().__init__(model, optimizer, 0.5, epochs, duty=duty, fine_tune=fine_tune)

    assert found(made(Mine)) == (6, 0.0, True)


@pytest.mark.parametrize(
    ("cls", "warm_up", "alpha"), [(SFP, 4, 1), (ASFP, 2, 1), (SRFP, 4, 0.5), (ASRFP, 2, 0.5), (GHFP, 4, 1)]
)
def test_the_tuned_values_of_soft_methods(cls, warm_up, alpha):
    """As docs/methods/index.md has them."""
    method = made(cls, epochs=16, duty=0.1, steps_per_epoch=10)
    assert (method.warm_up, method.epochs, method.alpha) == (warm_up, 8, alpha)
    assert method.alpha_schedule is schedules.constant and method.phases.deals and method.clip is None
    assert type(method.criterion) is criteria.CreditedL2


@pytest.mark.parametrize("cls", [SFP, ASFP, SRFP, ASRFP, GHFP])
def test_the_papers_values_of_soft_methods(cls):
    for options in ({}, {"duty": 1}, {"preset": "paper"}):
        method = made(cls, epochs=16, **options)
        assert (method.warm_up, method.epochs, method.alpha) == (0, 16, cls.default_alpha)
        assert method.alpha_schedule is schedules.decay and not method.phases.deals and method.clip is None
        assert method.criterion.function is criteria.l2


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 8, 200])
@pytest.mark.parametrize("cls", [SFP, ASFP, SRFP, ASRFP, GHFP, PruneWhileTraining])
def test_tuned_values_fit_into_any_number_of_epochs(cls, epochs):
    method = made(cls, epochs=epochs, duty=0.1)
    assert 0 <= method.warm_up < method.epochs <= epochs
    assert method.pruned_share(method.epochs - 1) == 0.5


@pytest.mark.parametrize("fine_tune", [0, 3, 6, 7])
@pytest.mark.parametrize("cls", [SFP, PruneWhileTraining])
def test_tuned_values_give_way_to_fine_tuning_that_is_given(cls, fine_tune):
    method = made(cls, epochs=8, duty=0.1, fine_tune=fine_tune)
    assert method.epochs == 8 - fine_tune and method.pruned_share(method.epochs - 1) == 0.5
    assert method.warm_up == (0 if cls is PruneWhileTraining else min(2, 7 - fine_tune))


def test_fine_tuning_that_is_too_long_is_told_by_its_name():
    with pytest.raises(ValueError, match="SFP: fine_tune: expected fewer than the 8 epochs, got 8"):
        made(SFP, epochs=8, duty=0.1, fine_tune=8)
