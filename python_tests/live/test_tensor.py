"""A live tensor in the hands of other code: attributes, copies, hooks, autograd, modes, threads, compilers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases.live import C, H, N, Operands, W, X, assert_as_plain, live_list
from prunekernels.live import LiveList, full_width
from prunekernels.live.tensor import wrap


def live(**args):
    return Operands(True, **args).x


ATTRIBUTES = {
    "shape": lambda x: x.shape, "size": lambda x: x.size(), "size of one": lambda x: x.size(1),
    "dim": lambda x: x.dim(), "ndim": lambda x: x.ndim, "dtype": lambda x: x.dtype, "device": lambda x: x.device,
    "len": len, "requires_grad": lambda x: x.requires_grad, "stride": lambda x: x.stride(),
    "layout": lambda x: x.layout, "contiguous": lambda x: x.is_contiguous(), "numel": lambda x: x.numel(),
    "torch.numel": torch.numel, "channels_last": lambda x: x.is_contiguous(memory_format=torch.channels_last),
    "leaf": lambda x: x.is_leaf, "type": lambda x: x.type(), "floating": lambda x: x.is_floating_point(),
    "element_size": lambda x: x.element_size(), "nbytes": lambda x: x.nbytes, "is_cpu": lambda x: x.is_cpu,
    "is_tensor": torch.is_tensor, "nelement": lambda x: x.nelement(),
    "isinstance": lambda x: isinstance(x, torch.Tensor), "has grad_fn": lambda x: x.grad_fn is not None,
    "tolist": lambda x: x.tolist(), "numpy": lambda x: x.detach().numpy().tolist(),
    "item": lambda x: x[0, 2, 0, 0].item(), "asarray": lambda x: np.asarray(x.detach()).tolist(),
    "iterate": lambda x: [t.tolist() for t in x], "bool": lambda x: bool(x.sum() > 0),
    "any": lambda x: bool((x > 0).any()), "max": lambda x: float(x.max()), "allclose": lambda x: torch.allclose(x, x),
    "equal": lambda x: torch.equal(x, x * 1), "isnan": lambda x: x.isnan().sum().item(),
    "norm": lambda x: round(x.norm().item(), 9), "std": lambda x: round(x.std().item(), 9),
    "format": lambda x: f"{x.sum():.3f}", "dlpack": lambda x: torch.from_dlpack(x.detach()).tolist(),
    "deepcopy": lambda x: copy.deepcopy(x.detach()).tolist(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())).tolist(),
    "copy": lambda x: copy.copy(x.detach()).tolist(), "data": lambda x: x.data.tolist(),
    "hash": lambda x: len({x, x}), "in": lambda x: any(x is t for t in [x]),
    "zeros_like": lambda x: torch.zeros_like(x).stride(), "new_zeros": lambda x: x.new_zeros(3).dtype,
    "empty_like": lambda x: torch.empty_like(x).shape,
    "copy_": lambda x: torch.zeros(N, C, H, W).double().copy_(x).tolist(),
    "tensor": lambda x: torch.as_tensor(x).tolist(), "storage": lambda x: x.untyped_storage().nbytes(),
    "grad": lambda x: x.grad if x.is_leaf else None, "result_type": lambda x: torch.result_type(x, 1.0),
    "broadcast": lambda x: torch.broadcast_shapes(x.shape, (1, 1)),
    "numpy sum": lambda x: float(np.sum(x.detach().numpy())),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_is_what_the_full_width_tensor_is(name, layout):
    got, want = (ATTRIBUTES[name](Operands(is_live, layout="nchw").x) for is_live in (True, False))
    assert got == want


def test_channels_last_is_seen():
    x = live(layout="channels_last")
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert x.stride() == x.to_dense().stride() == torch.zeros(N, C, H, W).to(memory_format=torch.channels_last).stride()


def test_repr_tells_what_is_live():
    assert repr(live()).startswith("LiveTensor(4/6 live, tensor([[[[")


def test_saving():
    x, file = live().detach(), io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["x"]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, x.to_dense())


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_lists_stay_one_object(clone):
    known = live_list((1, 2))
    known.remap(live_list((2, 3)), torch.device("cpu"))
    assert clone(known) is known and clone([known, known]) == [known, known]


def test_views_that_are_gone_are_forgotten():
    x = live()
    kept = x.flatten(2)
    for _ in range(20):
        x.flatten(2)
    assert kept._group() is x._group() and len(x._group().views) <= 2


def test_a_list_that_outlives_many_does_not_keep_them_all():
    everything = LiveList.all(64)
    for i in range(2000):
        everything.remap(live_list(sorted({i % 64, i // 64, (7 * i) % 64}), 64), torch.device("cpu"))
    assert len(everything._derived) <= 256


# ---- gradients ------------------------------------------------------------------------------------------------------


def square_relu(x):
    return (x * x).relu()


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("how", ["hook", "changing hook", "retain_grad"])
def test_hooks_on_a_tensor(how, when):
    def f(o):
        x, seen = o.x, []
        early = [] if when == "before" else [square_relu(x)]
        if how == "retain_grad":
            x.retain_grad()
        else:
            x.register_hook(seen.append if how == "hook" else lambda grad: grad * 2)
        late = [] if when == "after" else [torch.sigmoid(x) + x * 3]
        total = sum(early + late)
        total.mul(torch.arange(1.0, total.numel() + 1).view(total.shape)).sum().backward(retain_graph=True)
        grads = [x.grad] if how == "retain_grad" else [torch.stack(seen).sum(0)] if seen else []
        # Gradients of dead channels are known only where an operation ran at full width.
        mask = torch.zeros(C, 1, 1).double()
        mask[list(X)] = 1
        grads = [g if when == "before" else g * mask for g in grads]
        leaf = o.leaves[0].grad.clone()
        o.leaves[0].grad = None
        return [*grads, leaf, total]

    assert_as_plain(f)


def test_retained_gradients_add_up():
    def f(o):
        x = o.x
        x.retain_grad()
        for _ in range(2):
            x.relu().sum().backward(retain_graph=True)
        return x.grad, x.retains_grad

    assert_as_plain(f)


def test_nothing_is_retained_unasked():
    with pytest.warns(UserWarning, match="not a leaf"):
        assert live().grad is None


@pytest.mark.parametrize("how", ["attribute", "method"])
def test_a_detached_tensor_as_a_leaf(how):
    def f(o):
        x = o.x.detach()
        if how == "attribute":
            x.requires_grad = True
        else:
            assert x.requires_grad_() is x
        assert x.requires_grad and x.is_leaf
        square_relu(x).sum().backward()
        return x.grad

    assert_as_plain(f)


@pytest.mark.parametrize("inputs", ["one", "some"])
def test_gradients_of_a_live_tensor(inputs):
    def f(o):
        x = o.x.relu()
        y = (x * x + x.sigmoid()).sum((2, 3)) * 2
        (grad,) = torch.autograd.grad(y.square().sum(), x if inputs == "one" else [x], create_graph=True)
        mask = torch.zeros(C, 1, 1).double()
        mask[list(X)] = 1
        return grad * mask, (grad * mask).square().sum()

    assert_as_plain(f)


def test_unused_input():
    x, unused = live(), live()
    assert torch.autograd.grad(x.sum(), [x, unused], allow_unused=True)[1] is None


def test_backward_from_a_live_tensor():
    def f(o):
        y = square_relu(o.x)
        y.backward(torch.ones(N, C, H, W).double(), retain_graph=True)
        torch.autograd.backward([y], [y.detach()], retain_graph=True)
        return o.leaves[0].grad.clone()

    assert_as_plain(f)


def test_second_gradients():
    def f(compact):
        x = wrap(compact, live_list((1, 3), 4))
        other = wrap(compact * 2, live_list((0, 3), 4))
        y = (x + other).tanh().mean((2, 3), keepdim=True) * (x * other).sigmoid()
        return full_width(torch.cat((y, x), 1))

    leaf = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, leaf) and torch.autograd.gradgradcheck(f, leaf)


class SavesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class SavesOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class TwoInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx, product, total):
        x, y = ctx.saved_tensors
        return product * y + total, product * x + total


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * 2)


FUNCTIONS = {
    "saves its input": lambda o: SavesInput.apply(o.x), "saves its output": lambda o: SavesOutput.apply(o.x),
    "twice": lambda o: SavesOutput.apply(SavesInput.apply(o.x)).relu(), "through": lambda o: Through.apply(o.x) * 2,
    "two inputs": lambda o: TwoInputs.apply(o.x, o.other),
    "one plain": lambda o: TwoInputs.apply(o.plain, o.x)[0].relu(), "numpy": lambda o: Numpy.apply(o.x),
    "without gradient": lambda o: SavesOutput.apply(o.x.detach()),
    "used before and after": lambda o: SavesOutput.apply(o.x) + o.x,
    "checkpoint": lambda o: checkpoint(square_relu, o.x, use_reentrant=False),
    "reentrant": lambda o: checkpoint(square_relu, o.x, use_reentrant=True),
    "reentrant sigmoid": lambda o: checkpoint(torch.sigmoid, o.x, use_reentrant=True),
    "reentrant sum": lambda o: checkpoint(torch.add, o.x, o.other, use_reentrant=True).relu(),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_functions(name):
    def f(o):
        results = FUNCTIONS[name](o)
        results = list(results) if isinstance(results, tuple) else [results]
        total = sum((r * r * torch.arange(1.0, 1 + r.numel()).view(r.shape)).sum() for r in results)
        if total.requires_grad:  # a reentrant checkpoint supports backward() alone
            total.backward()
        grads = [leaf.grad for leaf in o.leaves if leaf.grad is not None]
        return [r.detach() for r in results] + [g for g in grads if g.any()]

    assert_as_plain(f)


def test_the_full_width_of_a_functions_result_has_its_history():
    assert_as_plain(lambda o: SavesInput.apply(o.x))


def test_a_function_that_writes_to_a_live_tensor():
    assert_as_plain(lambda o: InPlace.apply(o.x) * 3)
