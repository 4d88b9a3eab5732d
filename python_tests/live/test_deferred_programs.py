"""Programs in which what a deferred norm is made of, its history, or who sees its gradient needs care."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.deferred import TwoNorms
from prunekernels.live import LiveTensor

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="norms are deferred by the extension")


def backward(net, y):
    net.head(y).sin().sum().backward()


def sum_then_input_changed(net, x):
    with torch.no_grad():
        between = net.conv(x)
        total = net.norm(between) + net.other_norm(net.other(x))
        between.mul_(2)
        return F.relu(total)


def view_of_input_changed(net, x):
    with torch.no_grad():
        between = net.conv(x)
        view = between[:, :, 1:]
        y = net.norm(between)
        view.mul_(2)
        return F.relu(y)


def other_half_changed(net, x):
    with torch.no_grad():
        half, other = net.conv(x).chunk(2)
        y = net.norm(half)
        other.mul_(2)
        return F.relu(y)


def view_of_addend_changed(net, x):
    addend = net.other_norm(net.other(x)) * 2
    view = addend[:, :, 1:]
    total = net.norm(net.conv(x)) + addend
    view.mul_(3)
    backward(net, F.relu(total))


def reentrant_checkpoint(net, x):
    y = checkpoint(lambda x: net.norm(net.conv(x)), x, use_reentrant=True)
    backward(net, F.relu(y))


def reentrant_checkpoint_and_sum(net, x):
    y = checkpoint(lambda x: net.norm(net.conv(x)), x, use_reentrant=True)
    backward(net, F.relu(y + net.other_norm(net.other(x))))


def checkpoint_without_relu(net, x):
    """More often than a norm is patient: forward pass and recomputation have to save the same tensors."""
    for _ in range(4):
        backward(net, checkpoint(lambda x: F.silu(net.norm(net.conv(x))), x, use_reentrant=False))


def checkpoint_of_what_has_a_view(net, x):
    """The view is gone when the norm is computed again."""
    between = net.conv(x)
    views = [between[:, :, 1:]]
    y = checkpoint(net.norm, between, use_reentrant=False)
    views.clear()
    backward(net, y)


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm):
        return norm(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


def function_in_place(net, x):
    y = Normed.apply(net.conv(x), net.norm)
    backward(net, y.relu_())


def sum_in_place_without_gradients(net, x):
    y, addend = net.norm(net.conv(x)), net.other_norm(net.other(x))
    with torch.no_grad():
        y += addend
    backward(net, F.relu(y))


def relu_in_place_without_gradients(net, x):
    y = net.norm(net.conv(x))
    with torch.no_grad():
        F.relu(y, inplace=True)
    backward(net, y)


def made_in_inference_mode(net, x):
    with torch.inference_mode():
        y, addend = net.norm(net.conv(x)), net.other_norm(net.other(x))
    factor = torch.ones(1, requires_grad=True)
    (F.relu(y) * factor).sum().backward()  # saves the relu, a plain tensor
    return factor.grad, F.relu(y + addend)


def read_again_in_inference_mode(net, x):
    with torch.no_grad():
        y = net.norm(net.conv(x))
        F.relu(y)
    with torch.inference_mode():
        y.sum()
    factor = torch.ones(1, requires_grad=True)
    (y * factor).sum().backward()
    return factor.grad


def read_in_a_transform(net, x):
    with torch.no_grad():
        y = net.norm(net.conv(x))
    return torch.func.functionalize(lambda factor: factor * y)(torch.ones(1)), y * 2


def read_by_a_hook(net, x):
    """Between the backward passes of the relu and the norm."""
    seen = []
    y, other = net.norm(net.conv(x)), net.other(x)
    other.register_hook(lambda grad: seen.append(y.detach().mean()))
    backward(net, F.relu(y) + other.sigmoid())
    return seen[0]


def second_pass_in_the_middle_of_the_first(net, x):
    """By another thread, while the first is between the backward passes of the relu and the norm."""
    between, done, grads = threading.Event(), threading.Event(), []
    y, other = net.norm(net.conv(x)), net.other(x)

    def wait(grad):
        if not between.is_set():
            between.set(), done.wait(20)

    other.register_hook(wait)
    loss = net.head(F.relu(y) + other.sigmoid()).sin().sum()

    def go():
        grads.extend(torch.autograd.grad(loss, [x, *net.norm.parameters()], retain_graph=True))

    first = threading.Thread(target=go)
    first.start(), between.wait(20)
    go()
    done.set(), first.join()
    return tuple(grads)


def nodes_behind(node, said):
    found, seen, stack = [], set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if said(node.name()):
            found.append(node)
        stack += [each for each, _ in node.next_functions]
    return found


def is_norm(name):
    return "Norm" in name and "Relu" not in name


def unit(grad):
    return grad / grad.norm()


def hook_before_the_node_of_the_norm(net, x):
    out = net.head(F.relu(net.norm(net.conv(x))))
    (node,) = nodes_behind(out.grad_fn, is_norm)
    node.register_prehook(lambda grads: (unit(grads[0]), *grads[1:]))
    out.sin().sum().backward()


def hook_behind_the_node_of_the_relu(net, x):
    out = net.head(F.relu(net.norm(net.conv(x))))
    (node,) = nodes_behind(out.grad_fn, lambda name: "Relu" in name)
    node.register_hook(lambda grads, _: (unit(grads[0]), *grads[1:]))
    out.sin().sum().backward()


def gradient_at_an_edge(net, x):
    out = net.head(F.relu(net.norm(net.conv(x))))
    (node,) = nodes_behind(out.grad_fn, is_norm)
    edge = torch.autograd.graph.GradientEdge(node, 0)
    return torch.autograd.grad(out.sin().sum(), (edge, x), retain_graph=True)[0].abs().sum()


PROGRAMS = [
    sum_then_input_changed, view_of_input_changed, other_half_changed, view_of_addend_changed, reentrant_checkpoint,
    reentrant_checkpoint_and_sum, checkpoint_without_relu, checkpoint_of_what_has_a_view, function_in_place,
    sum_in_place_without_gradients, relu_in_place_without_gradients, made_in_inference_mode,
    read_again_in_inference_mode, read_in_a_transform, read_by_a_hook, second_pass_in_the_middle_of_the_first,
    hook_before_the_node_of_the_norm, hook_behind_the_node_of_the_relu, gradient_at_an_edge,
]  # fmt: skip


def run(program, net, flows):
    """What a program returns, and gradients. flows: live mode, or masked mode."""
    net = copy.deepcopy(net)
    if flows:
        net.other_norm._channels = pk.flow(net).norm._channels
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = program(net, x)
    results = results if isinstance(results, tuple) else (results,)
    return [t for t in (*results, x.grad, *(p.grad for p in net.parameters()), *net.buffers()) if t is not None]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_same_as_in_masked_mode(program):
    torch.manual_seed(0)
    net = TwoNorms()
    got, want = (run(program, net, flows) for flows in (True, False))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to_dense() if isinstance(a, LiveTensor) else a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("program", [sum_then_input_changed, view_of_input_changed],
                         ids=lambda program: program.__name__)  # fmt: skip
def test_inference_mode_has_no_versions_to_check(program):
    torch.manual_seed(0)
    net = TwoNorms()
    with torch.inference_mode():
        got, want = (run(program, net, flows)[0] for flows in (True, False))
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-4, atol=1e-4)


def test_an_error_is_not_forgotten():
    """The memory is not handed out by the next use."""
    with torch.no_grad():
        net = pk.flow(TwoNorms())
        between = net.conv(torch.randn(4, 3, 9, 9))
        stored = between.compact
        y = net.norm(between)
        stored.mul_(2)
        between.sum()  # has nothing to do with it
        for _ in range(3):
            with pytest.raises(RuntimeError, match="changed in place through `compact`"):
                y.to_dense()


def test_threads_that_read_one_result():
    with torch.no_grad():
        net = pk.flow(TwoNorms()).eval()
        between = net.conv(torch.randn(4, 3, 130, 130))
        want = net.norm(between).to_dense()
        for _ in range(20):
            y, found, start = net.norm(between), [], threading.Barrier(3)

            def read(y=y, found=found, start=start):
                start.wait()
                found.append(y * 1)

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 3 and all(torch.equal(each.to_dense(), want) for each in found)
