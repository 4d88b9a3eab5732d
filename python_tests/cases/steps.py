"""Parameters with gradients, mask tables, and samples of the operators of a training step."""

import torch
from torch import nn

OPS = torch.ops.prunekernels
SHAPES = ((16, 3, 3, 3), (16,), (64, 33, 3, 3), (64,), (50, 77), (12, 65, 1, 1), (9,), (), (0,), (1, 1, 1, 1))


def parameters(dtype=torch.float32, shapes=SHAPES, channels_last=False):
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    last = [t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t for t in made]
    return [nn.Parameter(t) for t in last]


def give_grads(*lists, integers=False):
    """The same new gradients to corresponding parameters."""
    for params in zip(*lists, strict=True):
        grad = torch.randint(-4, 5, params[0].shape).to(params[0].dtype) if integers else torch.randn_like(params[0])
        for p in params:
            p.grad = grad.clone()


def table(filters, kernels=None, inputs=None, channels=None, groups=1):
    K = len(filters) if filters is not None else len(kernels)
    C = channels or (len(inputs) if inputs is not None else kernels.shape[1] * groups)
    return OPS.conv_mask(filters, kernels, inputs, K, C, groups)


def chosen(*shape, share=0.5):
    """bool, True with this probability."""
    return torch.rand(shape) < share


def sums(*lengths):
    return [torch.full((length,), 7.0) for length in lengths]


def _step_lists(states, dtype=torch.float32, channels_last=False, masked=True):
    shapes = ((6, 5, 3, 3), (6,), (3, 4))
    weights, grads, *rest = ([p.detach() for p in parameters(dtype, shapes, channels_last)] for _ in range(2 + states))
    tables = [table(chosen(6), chosen(6, 5)), table(chosen(6), channels=1), None] if masked else [None] * 3
    return weights, grads, *([t.abs() for t in state] for state in rest), tables


def sgd_samples():
    numbers = (0.1, 0.9, 0.1, 0.01)
    for dtype, last, masked in (
        (torch.float32, False, True),
        (torch.float64, True, True),
        (torch.bfloat16, True, False),
    ):
        weights, grads, momenta, tables = _step_lists(1, dtype, last, masked)
        yield weights, grads, momenta, tables, sums(6, 0, 3), [], *numbers, False, False
    weights, grads, momenta, tables = _step_lists(1)
    yield weights, grads, [], tables, [], sums(6, 0, 0), 0.1, 0.0, 0.0, 0.0, False, False


def adamw_samples():
    for dtype, last in ((torch.float32, False), (torch.float64, True)):
        weights, grads, averages, squares, tables = _step_lists(2, dtype, last)
        steps = [torch.tensor(float(i)) for i in range(3)]
        yield weights, grads, averages, squares, steps, tables, [], sums(6, 0, 3), 0.1, 0.9, 0.99, 1e-8, 0.01


def mask_grad_samples():
    grads, weights, tables = _step_lists(0)[0], _step_lists(0)[1], _step_lists(0)[2]
    scales = [torch.rand(6), None, torch.ones(3)]
    yield grads, tables, scales, weights, [torch.ones_like(g) for g in grads], sums(6, 0, 3), [], sums(0, 6, 3), True
    grads, _, tables = _step_lists(0, torch.float64, True)
    yield grads, tables, [], [], [], [], [], [], False
    grads, _, _ = _step_lists(0, torch.bfloat16)
    yield grads, [], [], [], [], [], sums(6, 6, 3), [], False


def norm_samples():
    for dtype, last, per_kernel in ((torch.float32, False, False), (torch.float64, True, True)):
        weights, _, tables = _step_lists(0, dtype, last)
        at = slice(0, 1) if per_kernel else slice(None)
        yield weights[at], tables[at], per_kernel


def channel_samples():
    xs = [torch.randn(2, 5, 3, 4), torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)]
    yield xs, False
    yield [xs[0].bfloat16()], True


def cluster_samples():
    grads, weights, _ = _step_lists(0)
    clusters = [torch.tensor(ids, dtype=torch.int32) for ids in ([0, 1, 0, -1, 1, 0], [-1] * 6, [2, 2, 5])]
    yield grads, clusters, weights, 0.5
    yield grads[:1], clusters[:1], [], 0.0


SAMPLES = {
    "masked_sgd_": sgd_samples,
    "masked_adamw_": adamw_samples,
    "mask_grad_": mask_grad_samples,
    "filter_norms": norm_samples,
    "channel_mean": channel_samples,
    "cluster_mean_": cluster_samples,
}
