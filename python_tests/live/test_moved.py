"""Live tensors whose channels are not dimension 1: channels last, and views that split the channels."""

import pytest
import torch
import torch.nn.functional as F

from cases.live import C, H, N, Operands, W, X, assert_as_plain, assert_falls_back
from prunekernels.live import LiveList, LiveTensor
from prunekernels.live.moved import MovedTensor
from prunekernels.live.tensor import FilledTensor, wrap


def last(x):
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x.movedim(1, -1)


def groups(x):
    return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])


def assert_moved(f, kind=MovedTensor, **args):
    results, fallbacks = assert_as_plain(f, **args)
    assert not fallbacks and results and all(type(t) is kind for t in results), (fallbacks, [type(t) for t in results])
    return results


MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1), "permute tuple": lambda x: x.permute((0, 2, 3, 1)),
    "torch.permute": lambda x: torch.permute(x, (0, -2, -1, 1)), "swapped": lambda x: x.permute(0, 3, 2, 1),
    "channels first of all": lambda x: x.permute(1, 0, 2, 3), "images last": lambda x: x.permute(2, 3, 1, 0),
    "transpose": lambda x: x.transpose(1, 2), "transpose keywords": lambda x: x.transpose(dim0=-1, dim1=1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 3), "movedim": lambda x: x.movedim(1, -1),
    "movedim keywords": lambda x: torch.movedim(x, source=1, destination=2), "moveaxis": lambda x: x.moveaxis(-1, 1),
    "tokens": lambda x: x.flatten(2).transpose(1, 2), "tokens of images": lambda x: x.flatten(2).permute(2, 0, 1),
    "groups": groups, "three": lambda x: x.view(N, 3, -1, H, W), "reshape": lambda x: x.reshape(N, 2, 3, H * W),
    "unflatten": lambda x: x.unflatten(1, (2, -1)), "torch.unflatten": lambda x: torch.unflatten(x, 1, (3, 2)),
    "shuffled": lambda x: groups(x).transpose(1, 2), "shuffled last": lambda x: groups(x).permute(0, 3, 4, 2, 1),
    "unsqueeze": lambda x: x.unsqueeze(1), "unsqueeze 0": lambda x: x.unsqueeze(0),
    "view as a row": lambda x: x.mean((2, 3)).view(N, 1, C), "stack": lambda x: torch.stack([x, x * 2], 1),
    "stack first": lambda x: torch.stack([x, x * 2]), "stack last": lambda x: torch.stack((x, x * 2, x), dim=-1),
}  # fmt: skip
BACK = {
    "permute": lambda x: last(x).permute(0, 3, 1, 2), "transpose": lambda x: x.transpose(1, 2).transpose(1, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(N, C, H, W),
    "tokens viewed": lambda x: last(x).flatten(1, 2).permute(0, 2, 1).unflatten(2, (H, W)),
    "groups": lambda x: groups(x).view(N, C, H, W), "groups flattened": lambda x: groups(x).flatten(1, 2),
    "shuffle": lambda x: groups(x).transpose(1, 2).reshape(N, C, H, W),
    "shuffle contiguous": lambda x: groups(x).transpose(1, 2).contiguous().view(N, -1, H, W),
    "shuffle flattened": lambda x: groups(x).swapaxes(1, 2).flatten(1, 2),
    "shuffle of three": lambda x: x.view(N, 3, 2, H, W).transpose(1, 2).contiguous().view_as(x),
    "group": lambda x: groups(x)[:, 1], "select": lambda x: groups(x).select(1, 0),
    "unbind": lambda x: groups(x).unbind(1), "other first": lambda x: x.permute(2, 1, 3, 0),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1), "row": lambda x: x.mean((2, 3)).view(N, 1, C).view(N, C, 1, 1),
    "sum of groups": lambda x: groups(x).sum(1), "mean of groups": lambda x: groups(x).mean(1),
    "largest of groups": lambda x: groups(x).amax(dim=1), "sum shuffled": lambda x: groups(x).transpose(1, 2).sum(2),
    "sum axis": lambda x: torch.sum(groups(x), axis=-4), "sum of stack": lambda x: torch.stack([x, x * 2], 1).sum(1),
    "image by image": lambda x: last(x).permute(0, 3, 2, 1),
}  # fmt: skip
KEEPS = {
    "relu": F.relu, "gelu": F.gelu, "tanh": lambda m: m.tanh(), "clamp": lambda m: m.clamp(-1, 1),
    "* 2": lambda m: m * 2, "2 * m": lambda m: 2 * m, "/ 2": lambda m: m / 2, "pow": lambda m: m**2,
    "neg": lambda m: -m, "dropout": lambda m: F.dropout(m, 0.5, False), "sigmoid": torch.sigmoid,
    "1 - m": lambda m: 1 - m, "clone": lambda m: m.clone(), "contiguous": lambda m: m.contiguous(),
    "float": lambda m: m.float(), "to": lambda m: m.to(torch.float32), "type_as": lambda m: m.type_as(torch.ones(1)),
    "detach": lambda m: m.detach(), "m + m": lambda m: m + m.relu(), "m - m": lambda m: m.relu() - m,
    "m * m": lambda m: m * m.sigmoid(), "m / m": lambda m: m / m.exp(), "cat": lambda m: torch.cat([m, m.relu()]),
    "slice": lambda m: m[1:], "slices": lambda m: m[..., :, :], "narrow": lambda m: m.narrow(0, 1, 1),
    "chunk": lambda m: m.chunk(2), "split": lambda m: m.split([1, m.shape[0] - 1]), "index": lambda m: m[:],
    "new dimension": lambda m: m[..., None], "unsqueeze": lambda m: m.unsqueeze(1),
    "expand": lambda m: m[..., None].expand(*m.shape, 3), "scalar": lambda m: m * torch.tensor(2.0, dtype=m.dtype),
    "expand_as": lambda m: m[..., None].expand_as(torch.ones(*m.shape, 2)), "alpha": lambda m: torch.add(m, m, alpha=3),
}  # fmt: skip
WHERES = {
    "last": last, "groups": groups, "shuffled": lambda x: groups(x).transpose(1, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2), "second": lambda x: x.unsqueeze(1),
}  # fmt: skip
LAST = {
    "[C]": lambda o, m: m * o.column.flatten(), "[C] first": lambda o, m: o.column.flatten() * m,
    "/ [C]": lambda o, m: m / o.column.flatten(), "[1, C]": lambda o, m: m * o.column.flatten()[None],
    "pixels": lambda o, m: m * o.pixel_gate.permute(0, 2, 3, 1), "plain": lambda o, m: m * last(o.plain),
    "other": lambda o, m: m + last(o.other), "other *": lambda o, m: m * last(o.other),
    "gate": lambda o, m: m * last(o.other.mean((2, 3), True)).sigmoid(), "none": lambda o, m: m - last(o.none),
    "mean": lambda o, m: m.mean(2, keepdim=True), "mean of two": lambda o, m: m.sum((2,)).relu(),
    "pooled gate": lambda o, m: m * m.mean(2, True).sigmoid(), "channels": lambda o, m: m[..., 1:5],
    "cat of channels": lambda o, m: torch.cat([m, last(o.other)], -1),
    "cat of rows": lambda o, m: torch.cat([m, last(o.other)], 1),
    "cat plain": lambda o, m: torch.cat([m, last(o.plain)], 3),
    "split of channels": lambda o, m: m.split([1, 2, 3], -1), "row": lambda o, m: m[:, 1],
    "number": lambda o, m: m[:, :, -1], "windows": lambda o, m: m.view(N, 2, H // 2, 3, W // 3, C),
    "partition": lambda o, m: m.view(N, 2, H // 2, 3, W // 3, C).permute(0, 1, 3, 2, 4, 5),
    "reversed": lambda o, m: m.view(N, 2, H // 2, W, C).transpose(1, 2).reshape(N, H, W, C),
    "batched windows": lambda o, m: m.contiguous().view(N * H, W, C),
    "heads": lambda o, m: m.reshape(N, H * W, 2, C // 2),
}  # fmt: skip
IN_PLACE = {
    "relu_": lambda m: m.relu_(), "mul_": lambda m: m.mul_(2), "*=": lambda m: m.__imul__(3), "/=": lambda m: m.div_(2),
    "clamp_": lambda m: m.clamp_(-1, 1), "F.relu": lambda m: F.relu(m, inplace=True), "neg_": torch.neg_,
    "add_": lambda m: m.add_(m.relu()), "+= 0": lambda m: m.__iadd__(0),
}  # fmt: skip
FULL_WIDTH = {
    "softmax": lambda m: m.softmax(-1), "mean of all": lambda m: m.mean(), "largest of channels": lambda m: m.amax(-1),
    "var": lambda m: m.var(-1), "layer_norm": lambda m: F.layer_norm(m, (C,)), "sum over images": lambda m: m.sum(0),
    "matmul": lambda m: m @ torch.ones(C, 2).double(), "where": lambda m: torch.where(m > 0, m, 0.0),
    "+ 1 row": lambda m: m + torch.ones(W, C).double(), "add_ 1": lambda m: (m * 1).add_(1),
    "setitem": lambda m: written(m * 1), "image": lambda m: m[0], "roll": lambda m: m.roll(1, 1),
    "steps": lambda m: m[:, ::2], "channel": lambda m: m[..., 2], "view of all": lambda m: m.reshape(-1),
    "mixed": lambda m: m.flatten(1), "pad": lambda m: F.pad(m, (0, 0, 1, 1)),
    "dropout2d": lambda m: F.dropout2d(m, 0.5, False), "flip": lambda m: m.flip(1),
    "stack": lambda m: torch.stack([m, m]), "prelu": lambda m: F.prelu(m, torch.ones(H).double()),
    "max": lambda m: m.max(), "sigmoid linear": lambda m: F.linear(m.sigmoid(), torch.ones(2, C).double()),
    "int": lambda m: m.int(), "memory format": lambda m: m.clone(memory_format=torch.contiguous_format),
    "norm": lambda m: F.normalize(m, dim=-1), "pool": lambda m: F.avg_pool2d(m, 2),
    "conv": lambda m: F.conv2d(m, torch.ones(2, H, 1, 1).double()),
}  # fmt: skip
SPLIT = {
    "softmax": lambda g: g.softmax(1), "F.softmax": lambda g: F.softmax(g, dim=1),
    "log": lambda g: torch.log_softmax(g, 1), "nn.Softmax": torch.nn.Softmax(1),
    "softmax within": lambda g: g.transpose(1, 2).softmax(2), "dtype": lambda g: g.softmax(1, torch.float64),
    "weighted": lambda g: g * g.softmax(1), "pooled": lambda g: g * g.mean((3, 4), keepdim=True),
    "kept": lambda g: g.sum(1, keepdim=True),
    "by group": lambda g: g * torch.arange(1.0, 3.0).double().view(2, 1, 1, 1),
    "by member": lambda g: g * torch.arange(1.0, 4.0).double().view(3, 1, 1),
    "by channel": lambda g: g * torch.arange(1.0, 7.0).double().view(1, 2, 3, 1, 1), "pixels": lambda g: g[..., 1:],
    "sum of rows": lambda g: g.sum(3), "rows": lambda g: torch.cat([g, g.relu()], 3), "line": lambda g: g[:, :, :, 0],
}  # fmt: skip


def written(m):
    m[:, 1] = 3.0
    return m


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", MOVES)
def test_moves(name, layout):
    if layout == "nchw" or name not in ("tokens", "tokens of images", "reshape"):
        assert_moved(lambda o: MOVES[name](o.x), layout=layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", BACK)
def test_and_back(name, layout):
    assert_moved(lambda o: BACK[name](o.x), LiveTensor, layout=layout)


@pytest.mark.parametrize("name", MOVES | BACK)
@pytest.mark.parametrize("x", [(), (0, 1, 2, 3, 4, 5), (4,)], ids=["none", "all", "one"])
def test_other_lists(name, x):
    results, fallbacks = assert_as_plain(lambda o: (MOVES | BACK)[name](o.x), x=x)
    assert not fallbacks


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("name", KEEPS)
def test_each_element_alone(name, where):
    assert_moved(lambda o: KEEPS[name](WHERES[where](o.x)))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", LAST)
def test_channels_last(name, layout):
    results, fallbacks = assert_as_plain(lambda o: LAST[name](o, last(o.x)), layout=layout)
    assert not fallbacks and isinstance(results[0], LiveTensor)


@pytest.mark.parametrize("x", [(), (0, 1, 2, 3, 4, 5)], ids=["none", "all"])
@pytest.mark.parametrize("name", LAST)
def test_channels_last_of_other_lists(name, x):
    assert_as_plain(lambda o: LAST[name](o, last(o.x)), x=x)


@pytest.mark.parametrize("x", [(), (2,), (0, 1), (1, 2, 4), X])
@pytest.mark.parametrize("dim", [-1, 1, 2, 3])
def test_reductions_of_three_dimensions_with_channels(dim, x):
    def f(o):
        m = torch.stack([groups(o.x).transpose(1, 2).reshape(N, C, H, W), o.x.tanh()], -1).view(N, 2, 3, H, W, 2)
        return m.sum(dim), m.amax(dim, keepdim=True), m.sigmoid().mean(dim), m.cos().log_softmax(dim), m.softmax(dim)

    assert not assert_as_plain(f, x=x)[1]


@pytest.mark.parametrize("x", [X, (0, 3), (1,), ()])
@pytest.mark.parametrize("name", SPLIT)
def test_groups_of_channels(name, x):
    assert_moved(lambda o: SPLIT[name](groups(o.x)), x=x)


def test_what_is_dead_in_all_groups_stays_out():
    y = groups(Operands(True, x=(0, 3, 4)).x).sum(1)
    assert y.live.host.tolist() == [0, 1]
    gate = groups(Operands(True, x=(0, 3, 4)).x).softmax(1)
    assert gate.live.host.tolist() == [0, 1, 3, 4] and gate.fill == 0.5 and type(gate.source) is FilledTensor


def test_a_plain_gate_of_pooled_channels():
    """Efficient channel attention: its convolution over channels has all of them, its product the live ones."""

    def f(o):
        gate = F.conv1d(o.x.mean((2, 3)).view(N, 1, -1), o.values(1, 1, 3), padding=1).sigmoid()
        return o.x * gate.view(N, -1, 1, 1).expand_as(o.x)

    results, fallbacks = assert_as_plain(f)
    assert fallbacks == ["conv1d"] and type(results[0]) is LiveTensor


def test_lists_with_padding():
    """What lists are padded with stays padding, wherever its channels go, and adds to no other list."""
    live = LiveList.of_mask(torch.tensor([False, True, False, False, True, True, False, False]))
    padded = live.aligned(4)
    values = torch.randn(2, 4, 3, 3).double() * padded.is_live(torch.device("cpu")).view(-1, 1, 1)
    x = wrap(values, padded)
    shuffled = groups(x).transpose(1, 2).reshape(x.shape)
    assert shuffled.live.is_padded and shuffled.live.count == 4
    assert shuffled.live.unpadded.host.tolist() == [1, 2, 3]
    assert torch.equal(shuffled.to_dense(), groups(x.to_dense()).transpose(1, 2).reshape(x.shape))
    for f in (lambda g: g.sum(1), lambda g: g.softmax(1), lambda g: (g * g.softmax(1)).amax(1)):
        got, want = f(groups(x)), f(groups(x.to_dense()))
        assert isinstance(got, LiveTensor) and got.live.unpadded.count == got.live.count
        torch.testing.assert_close(got.to_dense(), want)


def test_a_shuffle_keeps_the_number_of_live_channels():
    x = Operands(True, x=(0, 1, 5)).x
    y = groups(x).transpose(1, 2).reshape(N, C, H, W)
    assert y.live.host.tolist() == [0, 2, 5] and y.compact.shape[1] == 3


@pytest.mark.parametrize("operands", ["flat", "line", "x"])
def test_linear_reads_live_channels(operands):
    def f(o):
        weight = o.values(3, C)
        m = getattr(o, operands)
        return F.linear(last(m), weight, weight[:, 0]) if m.dim() > 2 else F.linear(m, weight)

    results, fallbacks = assert_as_plain(f)
    assert not fallbacks and type(results[0]) is torch.Tensor
    assert_as_plain(f, x=())


@pytest.mark.parametrize("f", [lambda o: last(o.x) + last(o.plain), lambda o: (last(o.plain) * 1).add_(last(o.x))])
def test_a_sum_with_plain_channels_is_plain(f):
    results, fallbacks = assert_as_plain(f)
    assert not fallbacks and type(results[0]) is torch.Tensor


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name, where):
    def f(o):
        x = o.x * 1
        before = WHERES[where](x)
        result = IN_PLACE[name](before)
        assert result is before
        return result, before * 2, x, x * 2

    results, fallbacks = assert_as_plain(f)
    assert not fallbacks and isinstance(results[0], MovedTensor)


@pytest.mark.parametrize("change", ["relu_", "setitem", "add_", "zero_", "masked", "list", "mul"])
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("where", WHERES)
def test_aliases_see_what_was_written(where, changed, change):
    def f(o):
        x = o.x * 1
        both = x, WHERES[where](x)
        t = both[changed]
        if change == "setitem":
            t[:, :1] = 7
        elif change == "add_":
            t.add_(1)
        elif change == "mul":
            t.mul_(o.scalar)
        elif change == "masked":
            t.masked_fill_(t > 1, 3.0)
        elif change == "list":
            t.add_((o.x, WHERES[where](o.other))[changed] if changed else o.other)
        else:
            getattr(t, change)()
        return *both, both[0] * 2, both[1] * 3, WHERES[where](x)

    assert_as_plain(f)
    with torch.no_grad():
        assert_as_plain(f, grad=False)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_without_a_rule(name):
    assert_falls_back(lambda o: FULL_WIDTH[name](last(o.x)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["permute", "groups", "shuffled", "stack"])
def test_without_gradients(name, mode):
    with mode():
        assert_moved(lambda o: MOVES[name](o.x).relu(), grad=False)
        assert_as_plain(lambda o: MOVES[name](o.x).cumsum(1), grad=False)


MIXED = {
    "live + moved": lambda o: o.x.mean(3) + o.line.transpose(1, 2)[:, :H].transpose(1, 2),
    "moved + x": lambda o: last(o.x) + o.plain.sum(),
    "two ways": lambda o: o.x[..., :4] .transpose(1, 2)[:, :, :4] .sum(3, True) + o.plain[:, :4, :4, :1],
    "cat of two ways": lambda o: torch.cat([groups(o.x), groups(o.x).transpose(1, 2).transpose(1, 2)], 1),
    "cat mixed": lambda o: torch.cat([last(o.x), o.plain.permute(0, 2, 3, 1)], 0),
    "plain in place": lambda o: (last(o.plain) * 1).mul_(last(o.x)),
    "where": lambda o: torch.where(last(o.x) > 0, last(o.other), 1.0),
    "addcmul": lambda o: torch.addcmul(last(o.x), last(o.x), last(o.other)),
    "rank": lambda o: last(o.x) * last(o.plain)[None],
    "out": lambda o: torch.mul(last(o.x), 2, out=torch.empty(0).double()) if not o.grad else last(o.x) * 2,
    "of different splits": lambda o: o.x.view(N, 2, 3, H, W)[:, :, :2] + o.x.view(N, 3, 2, H, W)[:, :2],
}  # fmt: skip


@pytest.mark.parametrize("dims", [-1, (1, 3), (1, 2, 3), (0, 3)])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_sums_over_channels_are_of_live_ones(name, keepdim, dims):
    results, fallbacks = assert_as_plain(lambda o: getattr(last(o.x), name)(dims, keepdim))
    assert not fallbacks and type(results[0]) is torch.Tensor


@pytest.mark.parametrize("name", MIXED)
def test_other_operands(name):
    assert_as_plain(MIXED[name])
    with torch.no_grad():
        assert_as_plain(MIXED[name], grad=False)


WRONG = {
    "permute": lambda m: m.permute(0, 1, 2), "twice": lambda m: m.permute(0, 0, 1, 2), "view": lambda m: m.view(N, 7),
    "transpose": lambda m: m.transpose(1, 9),
    "shuffle": lambda m: groups(m.permute(0, 3, 1, 2)).transpose(1, 2).view(N, C, H, W),
    "squeeze": lambda m: m.squeeze(9), "select": lambda m: m.select(1, 99), "index": lambda m: m[:, :, 99],
    "add": lambda m: m + torch.ones(7).double(), "linear": lambda m: F.linear(m, torch.ones(2, 7).double()),
    "expand": lambda m: m.expand(N, H, W, 9), "cat": lambda m: torch.cat([m, m[..., 1:]], 0), "sum": lambda m: m.sum(8),
    "softmax": lambda m: m.softmax(7), "narrow": lambda m: m.narrow(1, 3, 9),
    "unflatten": lambda m: m.unflatten(3, (4, 2)), "movedim": lambda m: m.movedim(1, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused(name):
    x = Operands(True).x
    for m in (last(x), last(x.to_dense())):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            WRONG[name](m)
