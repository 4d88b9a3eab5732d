"""Optimizers inside the wrappers of training libraries: bind, methods and shrink find the one that steps."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.methods import assert_same, batches, chain, momentum, sgd, snapshot, train
from prunekernels import methods, optim

IMAGES = torch.randn(2, 3, 6, 6)


class LikeAccelerate(torch.optim.Optimizer):
    """A torch optimizer by class only: its own constructor never ran, so it has neither hooks nor state."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


class LikeLightning:
    """No torch optimizer by itself, but of a class that pretends to be the wrapped one."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type(f"Like{type(optimizer).__name__}", (LikeLightning, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self):
        return self._optimizer.step()

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Warmup:
    """What users write themselves: a schedule around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


def accelerated(optimizer):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def lightning(optimizer):
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import SingleDeviceStrategy

    wrapped = LightningOptimizer(optimizer)
    strategy = SingleDeviceStrategy("cpu")
    strategy._lightning_module = nn.Module()
    strategy.optimizer_step = lambda optimizer, closure, **kwargs: optimizer.step(**kwargs)
    wrapped._strategy, wrapped.strategy_kept_alive = strategy, strategy
    return wrapped


WRAPPERS = {
    "like accelerate": LikeAccelerate,
    "like lightning": LikeLightning,
    "by hand": Warmup,
    "two of them": lambda optimizer: LikeAccelerate(Warmup(optimizer)),
    "accelerate": accelerated,
    "lightning": lightning,
}
OPTIMIZERS = {
    "sgd": sgd,
    "masked": lambda net: optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=1e-2),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def steps(net, optimizer):
    for x, y in batches(0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def after_bind(make, wrap=lambda optimizer: optimizer):
    net = chain()
    plain = make(net)
    optimizer = wrap(plain)
    binding = optim.bind(optimizer, net, freeze=None if isinstance(plain, optim.MaskedSGD) else "dead")
    assert binding.optimizer is plain
    steps(net, optimizer)
    net[0].set_masks(filter=torch.arange(8) > 3, hard=torch.arange(8) > 3)
    dead = net[0].weight[:4].detach().clone()
    steps(net, optimizer)
    assert torch.equal(net[0].weight[:4], dead)
    return net.state_dict()


@wrappers
@optimizers
def test_bind(wrap, make):
    assert_same(after_bind(make, wrap), after_bind(make))


@wrappers
@optimizers
@pytest.mark.parametrize("options", [{}, {"duty": 0.5}, {"criterion": "update_norm"}], ids=str)
def test_methods(wrap, make, options):
    def trained(wrap):
        net = chain()
        plain = make(net)
        optimizer = wrap(plain)
        method = methods.GHFP(net, optimizer, 0.5, 3, **options)
        assert method.optimizer is plain
        train(net, optimizer, method, 3)
        assert all(layer.weight[method.states[name] == 2].abs().max() == 0 for name, layer in method.layers.items())
        return net.state_dict()

    assert_same(trained(wrap), trained(lambda optimizer: optimizer))


@wrappers
def test_momentum_of_hard_filters_is_forgotten(wrap):
    net = chain()
    plain = sgd(net)
    optimizer = wrap(plain)
    method = methods.GHFP(net, optimizer, 0.5, 3)
    train(net, optimizer, method, 3)
    for name, layer in method.layers.items():
        assert momentum(plain, layer.weight)[method.states[name] == 2].abs().max() == 0


@wrappers
def test_shrink(wrap):
    net = chain()
    plain = sgd(net)
    optimizer = wrap(plain)
    train(net, optimizer, methods.GHFP(net, optimizer, 0.5, 2, example_input=IMAGES), 2)
    small, result = pk.shrink(net, IMAGES, optimizer=optimizer)
    expected = pk.shrink(net, IMAGES, optimizer=plain)
    assert type(result) is torch.optim.SGD and result.state
    assert_same(snapshot(small, result), snapshot(*expected))


def test_schedulers_go_on():
    net = chain()
    plain = sgd(net)
    optimizer = LikeAccelerate(plain)
    methods.SFP(net, optimizer, 0.5, 3)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, 0.1)
    steps(net, optimizer)
    scheduler.step()
    assert plain.param_groups[0]["lr"] == pytest.approx(0.005)


# ---- refused


class Lookahead(torch.optim.Optimizer):
    """Writes weights after the step of the optimizer inside, so hooks around that step are not enough."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults
        self.state = {}

    def step(self, closure=None):
        self.optimizer.step()


class Unhooked(torch.optim.Optimizer):
    """Its constructor did not run, and there is nothing inside."""

    def __init__(self, params):
        self.param_groups, self.state, self.defaults = [{"params": list(params)}], {}, {}

    def step(self, closure=None):
        pass


class Sharded(torch.optim.SGD):
    """Like torch's ZeroRedundancyOptimizer: the state is that of another optimizer."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.optim = torch.optim.SGD(self.param_groups[0]["params"], lr)


class Master:
    """Like DeepSpeed with float16: the optimizer inside has float32 copies of the parameters."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def with_copies(net):
    return Master(torch.optim.SGD([p.detach().clone() for p in net.parameters()], 0.1))


REFUSED = {
    "no optimizer": (lambda net: 3, TypeError, "expected a torch.optim.Optimizer or a wrapper with one in .optimizer"),
    "state of its own": (lambda net: Lookahead(sgd(net)), TypeError, "got Lookahead, which has a state of its own"),
    "no hooks": (lambda net: Unhooked(net.parameters()), TypeError, "got Unhooked, whose step runs no hooks"),
    "shards": (lambda net: Sharded(net.parameters(), 0.1), TypeError, "got Sharded, whose state is in .optim"),
    "copies": (with_copies, ValueError, "expected the model's own parameters, got copies of them"),
}
refused = pytest.mark.parametrize("case", REFUSED)


def hooked(net):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


@refused
def test_bind_refuses(case):
    make, error, text = REFUSED[case]
    net = chain()
    with pytest.raises(error, match=f"bind: optimizer: .*{text}"):
        optim.bind(make(net), net)


@refused
def test_methods_refuse(case):
    make, error, text = REFUSED[case]
    net = chain()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=f"SFP: optimizer: .*{text}"):
        methods.SFP(net, make(net))
    assert hooked(net) == 0
    assert_same(before, net.state_dict())


@refused
def test_shrink_refuses(case):
    make, error, text = REFUSED[case]
    net = chain()
    with pytest.raises(error, match=f"shrink: optimizer: .*{text}"):
        pk.shrink(net, IMAGES, optimizer=make(net))


def test_lookahead_of_timm():
    Lookahead = pytest.importorskip("timm.optim").Lookahead
    net = chain()
    with pytest.raises(TypeError, match="got Lookahead, whose step runs no hooks"):
        optim.bind(Lookahead(sgd(net)), net)


def test_zero_of_torch(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles scripts, so not at the top

    net = chain()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(TypeError, match="got ZeroRedundancyOptimizer, whose state is in .optim"):
            optim.bind(optimizer, net)
    finally:
        torch.distributed.destroy_process_group()
