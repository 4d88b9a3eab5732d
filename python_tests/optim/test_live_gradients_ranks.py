"""pk.live_gradients_hook on several processes: the gradients of DDP from fewer bytes, and masks that differ."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunekernels as pk
from cases.live_gradients import assert_same, gradients, hooked, images, live_count, network, set_masks
from cases.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


def counted(rank, steps, **options):
    """Of each step: the gradients with the hook and without it, in the bytes that both gave to all_reduce."""
    sent, real = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if tensor.is_floating_point():
            sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    net, plain = network(), network()
    model, state = hooked(net, **options)
    reference = DistributedDataParallel(plain, **options)
    found = []
    for step in range(steps):
        for each in (net, plain):
            set_masks(each, step // 2)
        x = images(100 * step + rank)
        expected = gradients(reference, x)
        sent.clear()
        got = gradients(model, x)
        found.append((got, expected, sum(sent), state.sent_bytes, 4 * live_count(net)))
    dist.all_reduce = real
    return found


def of_two(rank):
    with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "counted": counted(rank, 4), "views": counted(rank, 2, gradient_as_bucket_view=True),
            "differ": differ(rank), "weight_grad": other_weight_grad(rank), "restored": restored(rank),
            "broadcast": broadcast(rank), "late": late(rank),
        }  # fmt: skip


def differ(rank):
    """Other filters of a layer, as many on each rank; and the same filters of other layers. The error of each."""
    errors = []
    for layer, shift in ((1, rank), (1 + rank, 0)):
        net = nn.Sequential(pk.MaskedConv2d(4, 8, 3), pk.MaskedConv2d(8, 8, 1), pk.MaskedConv2d(8, 8, 1))
        model, _ = hooked(net, broadcast_buffers=False)
        gradients(model, images(0))
        net[layer].set_masks(filter=torch.arange(8) % 2 == shift)
        with pytest.raises(ValueError) as error:
            gradients(model, images(0))
        errors.append(str(error.value))
    return errors


def other_weight_grad(rank):
    net = network()
    set_masks(net)
    model, _ = hooked(net, broadcast_buffers=False)
    net[0].weight_grad = "dense" if rank else "masked"
    with pytest.raises(ValueError) as error:
        gradients(model, images(0))
    return str(error.value)


def restored(rank):
    """Other masks on one rank between two steps, the same ones in the steps: nothing to agree on."""
    net = network()
    set_masks(net)
    model, _ = hooked(net, broadcast_buffers=False)
    found = [gradients(model, images(rank))]
    if rank == 0:
        set_masks(net, 1)
        set_masks(net)
    return [*found, gradients(model, images(rank))]


def broadcast(rank):
    """Only rank 0 changes its masks, and DDP broadcasts buffers in the next forward pass."""
    net = network()
    model, state = hooked(net)
    gradients(model, images(rank))
    if rank == 0:
        set_masks(net)
    return [*gradients(model, images(rank)), torch.tensor([state.sent_bytes, 4 * live_count(net)])]


def late(rank):
    """Only rank 0 changes its masks: the error of each rank. The last thing that a group does."""
    net = network()
    model = DistributedDataParallel(net, broadcast_buffers=False)
    model.register_comm_hook(pk.LiveGradients(net, timeout=1.0), pk.live_gradients_hook)
    gradients(model, images(0))
    if rank == 0:
        set_masks(net)
    with pytest.raises(RuntimeError) as error:
        gradients(model, images(0))
        dist.barrier()
    return str(error.value)


@pytest.fixture(scope="module")
def two():
    return run_ranks(of_two, 2)


@pytest.mark.parametrize("case", ["counted", "views"])
def test_two_ranks_get_the_same_bits_as_without_it(two, case):
    """A sum of two numbers does not depend on their order; a half of it is exact."""
    for rank in two:
        for got, expected, *_ in rank[case]:
            assert_same(got, expected)
    assert any(grad.any() for grad in two[0][case][0][0])


def test_two_ranks_send_what_the_masks_leave(two):
    for rank in two:
        for _, expected, sent, told, live in rank["counted"]:
            assert sent == told == live < 4 * sum(grad.numel() for grad in expected)


def test_other_masks_on_a_rank_are_an_error_on_all(two):
    for rank in two:
        assert len(rank["differ"]) == 2
        for error in rank["differ"]:
            assert error.startswith("check_same_masks: 1: expected the masks of rank 0 on all 2 ranks, got others on ")
        assert "got equal masks, but another weight_grad on some of them" in rank["weight_grad"]


def test_a_change_that_is_undone_before_the_step_is_none(two):
    assert_same(two[0]["restored"][0], two[0]["restored"][1])
    assert_same(two[0]["restored"][0], two[1]["restored"][1])


def test_masks_that_are_broadcast(two):
    first, second = (rank["broadcast"] for rank in two)
    assert_same(first, second)
    sent, live = first[-1].tolist()
    assert sent == live and any(grad.any() for grad in first[:-1])


def test_a_change_on_one_rank_alone_is_an_error_there(two):
    """And on the other one, which waits for its gradients, where that process ends."""
    expected = (
        "live_gradients_hook: expected all ranks to change their masks before the same step, as this one (rank 0)"
    )
    assert two[0]["late"].startswith(f"{expected} did, got: ")
    assert two[1]["late"]


def of_four(rank):
    return counted(rank, 3), in_a_group(rank)


def in_a_group(rank):
    """Ranks 0 and 1 train together, and 2 and 3, each pair with masks of its own: with the hook and without it."""
    group = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    found = []
    for has_hook in (True, False):
        net = network()
        set_masks(net, rank // 2)
        model = DistributedDataParallel(net, process_group=group)
        if has_hook:
            model.register_comm_hook(pk.LiveGradients(model, group), pk.live_gradients_hook)
        found.append(gradients(model, images(rank)))
    return found


@pytest.mark.slow
def test_four_ranks():
    """Sums of four numbers depend on their order, which depends on the place in the bucket."""
    ranks, pairs = zip(*run_ranks(of_four, 4), strict=True)
    for got, expected in pairs:
        assert_same(got, expected)
    assert not torch.equal(pairs[0][0][0], pairs[2][0][0])
    for rank in ranks:
        for (got, expected, sent, told, live), (of_first, *_) in zip(rank, ranks[0], strict=True):
            assert sent == told == live
            assert_same(got, of_first)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def uneven(rank):
    """Rank 1 has two more batches."""
    net = network()
    set_masks(net)
    model, _ = hooked(net)
    with model.join():
        for step in range(1 + 2 * rank):
            grads = gradients(model, images(step))
    return grads


@pytest.mark.slow
def test_uneven_inputs():
    """A rank that has no batch left sends zeros."""
    net = network()
    set_masks(net)
    expected = [grad / 2 for grad in gradients(net, images(2))]
    for got, grad in zip(run_ranks(uneven, 2)[1], expected, strict=True):
        torch.testing.assert_close(got, grad)
