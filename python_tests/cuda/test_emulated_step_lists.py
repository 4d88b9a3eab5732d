"""The operators of a training step by the emulated CUDA operators: what the host reads of masks and clusters and when,
capturing, errors.
"""
# ruff: noqa: F811 (fixtures)

import pytest
import torch

from cases.emulated_ops import events, library  # noqa: F401
from cases.emulated_steps import CLUSTERS, F32, OURS, SGD, assert_like_the_cpu, emulated, ids, parameters  # noqa: F401
from cases.steps import chosen, table

pytestmark = pytest.mark.slow  # compiles csrc/cuda


def new_tables():
    torch.manual_seed(7)
    return [table(chosen(8), chosen(8, 33)), table(chosen(8), channels=1), None]


def sgd_call(tables):
    weights, grads, momenta, _ = parameters("nothing", F32, "contiguous", 3)
    return weights, grads, momenta, tables, [], [], *SGD["momentum"]


def adamw_call(tables):
    weights, grads, averages, squares, _ = parameters("nothing", F32, "contiguous", 4)
    return weights, grads, averages, squares, [torch.zeros(()) for _ in "123"], tables, [], [], *[0.1] * 5


def mask_grad_call(tables):
    _, grads, _ = parameters("nothing", F32, "contiguous", 2)
    return grads, tables, [], [], [], [], [], [], False


def norms_call(tables):
    return parameters("nothing", F32, "contiguous", 1)[0], tables, False


def cluster_call(lists):
    return parameters("nothing", F32, "contiguous", 1)[0], lists, [], 0.0


def new_clusters():
    return [c.clone() for c in CLUSTERS]


CALLS = {  # arguments with these lists, new lists, how many the host reads, what is launched
    "masked_sgd_": (sgd_call, new_tables, 2, "launch_optim_sgd"),
    "mask_grad_": (mask_grad_call, new_tables, 2, "launch_mask_grad"),
    "filter_norms": (norms_call, new_tables, 2, "launch_filter_norms"),
    "cluster_mean_": (cluster_call, new_clusters, 3, "launch_cluster_mean"),
}


@pytest.mark.parametrize("name", CALLS)
def test_lists_are_read_once_and_then_may_be_captured(name, library, emulated, events):
    call, make, count, launcher = CALLS[name]
    lists, op = make(), getattr(emulated, name)
    op(*call(lists))
    assert events().count("download") == count
    library.pk_pretend_to_capture(True)
    op(*call(lists))
    assert events() == [launcher]
    with pytest.raises(ValueError, match=rf"{name}: \w+: expected .* before the capture .*run a step.*, got a"):
        op(*call(make()))


@pytest.mark.parametrize("name", CALLS)
def test_a_changed_list_is_read_again(name, emulated, events):
    call, make, _, _ = CALLS[name]
    lists = make()
    getattr(emulated, name)(*call(lists))
    change = make()[0] if name == "cluster_mean_" else table(chosen(8), chosen(8, 33))
    lists[0].copy_(change.flip(0) if name == "cluster_mean_" else change)
    events()
    assert_like_the_cpu(emulated, name, lambda: call(lists))
    assert events().count("download") == 1


def test_tables_of_a_layer_serve_all_operators(emulated, events):
    """And the convolutions: what is kept of a table is the same."""
    tables = new_tables()
    for name in ("masked_sgd_", "mask_grad_", "filter_norms"):
        getattr(emulated, name)(*CALLS[name][0](tables))
    emulated.masked_adamw_(*adamw_call(tables))
    assert events().count("download") == 2


def test_adamw_is_not_captured(library, emulated):
    """Its numbers change in every step."""
    tables, capture = new_tables(), "masked_adamw_: steps: expected .*, got the capture of a graph"
    emulated.masked_adamw_(*adamw_call(tables))
    library.pk_pretend_to_capture(True)
    arguments = adamw_call(tables)
    with pytest.raises(ValueError, match=capture):
        emulated.masked_adamw_(*arguments)
    assert [float(t) for t in arguments[4]] == [0.0] * 3


# ---- errors


W, T = torch.ones(4, 3, 1, 1), table(torch.arange(4) > 1, channels=3)
NUMBERS = {"masked_sgd_": (0.1, 0.9, 0.0, 0.0, False, False), "masked_adamw_": (0.1, 0.9, 0.9, 1e-8, 0.0)}
RIGHT = {
    "masked_sgd_": {"weights": [W], "grads": [W], "momenta": [W], "masks": [T], "abs_updates": [],
                    "square_updates": []},
    "masked_adamw_": {"weights": [W], "grads": [W], "exp_avgs": [W], "exp_avg_sqs": [W], "steps": [torch.zeros(())],
                      "masks": [T], "abs_updates": [], "square_updates": []},
    "mask_grad_": {"grads": [W], "masks": [], "grad_scales": [], "weights": [], "accumulated": [], "abs_sums": [],
                   "square_sums": [], "product_sums": [], "add_to_sums": False},
    "filter_norms": {"weights": [W], "masks": [T], "per_kernel": False},
    "channel_mean": {"xs": [W], "relu": False},
    "cluster_mean_": {"grads": [W], "clusters": [CLUSTERS[2]], "weights": [], "strength": 0.0},
}  # fmt: skip
FIVE, FOUR = table(torch.ones(5) > 0, channels=3), torch.ones(4)
WRONG = {
    "masked_sgd_": [{"grads": []}, {"grads": [W[:2]]}, {"grads": [W.double()]},
                    {"momenta": []}, {"momenta": [W[0]]}, {"masks": []}, {"masks": [FIVE]},
                    {"masks": [ids(*range(40))]}, {"weights": [W.int()], "grads": [W.int()]},
                    {"abs_updates": [FOUR] * 2}, {"abs_updates": [FOUR.double()]}, {"square_updates": [FOUR[:3]]},
                    {"weights": [FOUR], "grads": [FOUR], "momenta": [FOUR], "masks": [None], "abs_updates": [FOUR]}],
    "masked_adamw_": [{"exp_avgs": []}, {"exp_avg_sqs": [W.half()]}, {"steps": []}, {"steps": [torch.zeros(2)]},
                      {"steps": [torch.zeros((), dtype=torch.int64)]}],
    "mask_grad_": [{"masks": [T, T]}, {"masks": [FIVE]}, {"grad_scales": [FOUR[:3]]}, {"abs_sums": [FOUR[:3]]},
                   {"abs_sums": [FOUR.int()]}, {"square_sums": [FOUR, FOUR]}, {"product_sums": [FOUR]},
                   {"product_sums": [FOUR], "weights": [W.double()]}, {"product_sums": [FOUR], "weights": [W[:3]]},
                   {"accumulated": [W.double()]}, {"accumulated": [W[:3]]}, {"grads": [W, W.double()]},
                   {"grads": [W.int()]}, {"grads": [W.sum()]}],
    "filter_norms": [{"weights": [FOUR], "masks": [], "per_kernel": True}, {"masks": [FIVE]}, {"masks": [T, T]},
                     {"weights": [W.int()]}],
    "channel_mean": [{"xs": [FOUR]}, {"xs": [W.int()]}],
    "cluster_mean_": [{"clusters": []}, {"clusters": [FOUR]}, {"clusters": [CLUSTERS[0]]}, {"weights": [W, W]},
                      {"weights": [W[:3]]}, {"weights": [W.double()]}, {"grads": [W.int()]}],
}  # fmt: skip
EVERY = [(name, at) for name, wrong in WRONG.items() for at in range(len(wrong))]


@pytest.mark.parametrize(("name", "at"), EVERY)
def test_errors_are_those_of_the_cpu(name, at, emulated):
    arguments = [*(RIGHT[name] | WRONG[name][at]).values(), *NUMBERS.get(name, ())]
    said = []
    for operators in (emulated, OURS):
        with pytest.raises(ValueError) as why:
            getattr(operators, name)(*arguments)
        said.append(str(why.value).partition("\n")[0])
    assert said[0] == said[1]


def test_no_step_is_counted_that_is_not_made(emulated):
    arguments = RIGHT["masked_adamw_"] | {"exp_avgs": [W[:2]], "steps": [torch.zeros(())]}
    with pytest.raises(ValueError, match="exp_avgs"):
        emulated.masked_adamw_(*arguments.values(), *NUMBERS["masked_adamw_"])
    assert float(arguments["steps"][0]) == 0
