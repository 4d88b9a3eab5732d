"""Training loops in compacted mode: what is read, saved, loaded, stepped or evaluated is never stale."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import prunekernels as pk
from cases.methods import EVERY, assert_same, batches, chain, residual, sgd, snapshot, together, train_modes
from prunekernels.methods import GHFP, PGP, SFP

IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64)
SPARSE = {"rate": 0.5, "epochs": 4, "duty": 0.5, "steps_per_epoch": 4, "example_input": IMAGES}


def made(cls=SFP, net=None, optimizer=sgd, mode="compacted", **options):
    net = chain(dtype=torch.float64) if net is None else net
    optimizer = optimizer(net)
    return net, optimizer, cls(net, optimizer, **together(cls) | SPARSE | options, mode=mode)


def one_step(method, x=None, y=None):
    x, y = next(batches(0, torch.float64)) if x is None else (x, y)
    method.opt.zero_grad()
    F.cross_entropy(method.net(x), y).backward()
    method.opt.step()
    method.step()


# ---- the mode


def test_a_mode_is_masked_or_compacted():
    with pytest.raises(ValueError, match="SFP: mode: expected one of masked, compacted, got 'live'"):
        made(mode="live")


def test_compacted_mode_needs_an_input():
    with pytest.raises(ValueError, match="SFP: example_input: expected an input, which mode='compacted' needs, got N"):
        made(example_input=None)
    _, _, method = made(example_input=None, mode="masked")
    with pytest.raises(ValueError, match="SFP: example_input: expected an input"):
        method.mode = "compacted"
    assert method.mode == "masked"


def test_an_optimizer_that_mixes_entries_is_told_at_once():
    with pytest.raises(TypeError, match="compacted: optimizer: expected one that steps each entry .* got Adafactor"):
        made(optimizer=lambda net: torch.optim.Adafactor(net.parameters(), 0.01))


class Counting(nn.Module):
    """Its forward depends on how many channels there are: no small network gives what the masked one gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(x * (1.0 if x.shape[1] == 8 else 2.0)).mean((2, 3))


def test_a_network_without_a_small_form_is_told():
    net = Counting().double()
    pk.convert(net)
    net, _, method = made(net=net, skip=["second"])
    with pytest.raises(ValueError, match="SFP: mode: expected 'masked', as this network has no small form: compacted:"):
        method.net  # noqa: B018
    method.mode = "masked"
    assert method.net is net


def test_dense_phases_train_the_model_itself():
    net, optimizer, method = made()
    assert method.net is not net and method.opt is not optimizer and method.is_compacted
    assert [m.out_channels for m in method.net.modules() if isinstance(m, nn.Conv2d)] == [4, 6, 5]
    assert type(method.net) is type(net) and type(method.opt) is torch.optim.SGD
    one_step(method)
    one_step(method)
    assert method.net is net and method.opt is optimizer and not method.is_compacted


def test_net_and_opt_are_the_same_objects_at_every_step():
    _, _, method = made(duty=0.0)
    net, opt = method.net, method.opt
    for epoch in range(3):
        train_modes([method], epoch)
        method.end_epoch()
        assert method.net is net and method.opt is opt


def test_nothing_dead_is_not_compacted():
    net, optimizer, method = made(rate=0.0)
    assert method.net is net and method.opt is optimizer and not method.is_compacted


def test_the_mode_may_change_at_any_step():
    runs = made(mode="masked", duty=0.0), made(duty=0.0)
    for epoch in range(3):
        for step, (x, y) in enumerate(batches(epoch, torch.float64)):
            runs[1][2].mode = "masked" if (epoch + step) % 3 == 0 else "compacted"
            for *_, method in runs:
                one_step(method, x, y)
        for *_, method in runs:
            method.end_epoch()
    for a, b in zip(*(snapshot(*run[:2]).values() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---- steps


def test_a_step_of_the_wrong_optimizer_is_an_error():
    net, optimizer, method = made()
    one_step(method)
    with pytest.raises(RuntimeError, match="SFP: optimizer: expected steps of method.opt, over method.net"):
        optimizer.step()
    method.leave()
    F.cross_entropy(net(IMAGES), torch.tensor([0, 1])).backward()
    optimizer.step()


def test_masks_that_the_user_changes_inside_are_an_error():
    net, _, method = made()
    one_step(method)
    small = method.net.get_submodule("0").weight.detach().clone()
    net[0].set_masks(filter=torch.ones(8, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="compacted: 0: expected masks that stay as they are"):
        method.step()
    rows = method.states["0"] == 0
    assert torch.equal(net[0].weight[rows], small) and not method.is_compacted


def test_a_closure_steps():
    runs = made(GHFP, mode="masked", criterion="taylor"), made(GHFP, criterion="taylor")
    for epoch in range(2):
        for x, y in batches(epoch, torch.float64):
            for *_, method in runs:

                def closure(method=method, x=x, y=y):
                    method.net.zero_grad()
                    loss = F.cross_entropy(method.net(x), y)
                    loss.backward()
                    return loss

                method.opt.step(closure)
                method.step()
        assert runs[0][2].end_epoch() == runs[1][2].end_epoch()
    for a, b in zip(*(snapshot(*run[:2]).values() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class Pulled(SFP):
    """A method whose own work before each step reads weights and gradients and changes the latter."""

    def _begin(self, is_new):
        super()._begin(is_new)
        self.before_step(self._pull)

    @torch.no_grad()
    def _pull(self):
        for layer in self.layers.values():
            live = layer.filter_mask & layer.hard_mask
            layer.weight.grad[live] += 0.1 * layer.weight[live] - layer.weight.grad[live].mean()


def test_work_of_a_method_before_each_step():
    runs = made(Pulled, residual().double(), mode="masked"), made(Pulled, residual().double())
    for epoch in range(3):
        assert train_modes([method for *_, method in runs], epoch) >= 2
        assert runs[0][2].end_epoch() == runs[1][2].end_epoch()
    for a, b in zip(*(snapshot(*run[:2]).values() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradients_of_the_model_are_left_alone():
    net, _, method = made(PGP, rate=0.6, duty=0.0)
    train_modes([method], 0)
    method.end_epoch()
    held = net[0].weight.grad
    one_step(method)
    assert method.is_compacted and net[0].weight.grad is held


def test_a_layer_without_a_gradient_has_none_at_full_width():
    net, _, method = made(GHFP, criterion="gradient_norms", clip=False)
    train_modes([method], 0)
    method.end_epoch()
    assert net[3].weight.grad is not None  # of the dense phase
    small = method.net
    small.get_submodule("3").weight.requires_grad_(False)
    one_step(method)
    assert small is method.net and method.is_compacted and method.criterion.sums.keys() == {"0", "6"}


# ---- evaluation


@pytest.mark.parametrize("duty", [0.0, 0.5])
def test_evaluation_of_all_masks(duty):
    net, _, method = made(GHFP, duty=duty)
    reference, _, other = made(GHFP, duty=duty, mode="masked")
    for epoch in range(2):
        train_modes([method, other], epoch)
        with method.masked(), other.masked(), torch.no_grad():
            expected = reference.eval()(IMAGES)
            torch.testing.assert_close(net.eval()(IMAGES), expected)
            torch.testing.assert_close(method.net(IMAGES), expected)
            assert method.is_compacted
        net.train(), reference.train()
        assert method.end_epoch() == other.end_epoch()


def test_training_mode_of_the_small_network_goes_over():
    net, _, method = made()
    net.eval()
    method.net.train()
    method.net.get_submodule("1").eval()  # a norm that keeps its statistics
    one_step(method)
    one_step(method)
    assert method.net is net and net.training and not net[1].training and net[4].training


def test_eval_of_the_model_stays_when_the_small_network_is_left():
    net, _, method = made()
    one_step(method)
    net.eval()
    with method.masked():
        assert not net.training
    assert not net.training


# ---- checkpoints


def masked_sgd(net):
    return pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=1e-2)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 1e-2)


def states_of(net, optimizer, method):
    """In an order in which nothing leaves the small network before the first one is taken."""
    held = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict()}, held)
    held.seek(0)
    return torch.load(held, weights_only=True)


def load(states, net, optimizer, method):
    states = copy.deepcopy(states)  # an optimizer goes on with the tensors that it is given
    net.load_state_dict(states["net"])
    optimizer.load_state_dict(states["optimizer"])
    method.load_state_dict(states["method"])


def everything(net, optimizer):
    names = {p: name for name, p in net.named_parameters()}
    found = {name: t.clone() for name, t in net.state_dict().items()}
    for p, state in optimizer.state.items():
        found |= {f"{names[p]}.{key}": value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, sgd) for name in EVERY), ("ghfp", masked_sgd), ("asfp", adamw)]
)
def test_resumes_to_the_bit(name, optimizer):
    run = made(EVERY[name], optimizer=optimizer)
    states = None
    for epoch in range(4):
        train_modes([run[2]], epoch)
        run[2].end_epoch()
        if epoch == 1:
            states = states_of(*run)
            other = made(EVERY[name], optimizer=optimizer, state=None)
            load(states, *other)
    for epoch in (2, 3):
        train_modes([other[2]], epoch)
        other[2].end_epoch()
    assert run[2].compaction is not None and other[2].history == run[2].history
    assert_same(everything(*run[:2]), everything(*other[:2]))


@pytest.mark.parametrize("criterion", ["taylor", "update_norm", "mean_activation", "gradient_sum"])
def test_resumes_to_the_bit_in_the_middle_of_a_sparse_phase(criterion):
    run = made(GHFP, criterion=criterion)
    train_modes([run[2]], 0)
    run[2].end_epoch()
    one_step(run[2])
    assert run[2].net is not run[0]
    states = states_of(*run)
    other = made(GHFP, criterion=criterion, state=None)
    load(states, *other)
    for *_, method in (run, other):
        for x, y in batches(7, torch.float64, 3):
            one_step(method, x, y)
        method.end_epoch()
    assert run[2].history == other[2].history
    assert_same(everything(*run[:2]), everything(*other[:2]))


def test_state_dicts_are_current_while_the_small_network_trains():
    runs = made(mode="masked"), made()
    for *_, method in runs:
        one_step(method)
    masked, compacted = runs
    assert compacted[2].is_compacted
    for name, tensor in masked[0].state_dict().items():
        torch.testing.assert_close(compacted[0].state_dict()[name], tensor)
    one_step(masked[2])
    one_step(compacted[2])
    theirs = compacted[1].state_dict()["state"]
    for key, state in masked[1].state_dict()["state"].items():
        torch.testing.assert_close(theirs[key]["momentum_buffer"], state["momentum_buffer"])


def test_going_back_to_a_checkpoint():
    run = made(duty=0.0)
    train_modes([run[2]], 0)
    run[2].end_epoch()
    states, before = states_of(*run), everything(*run[:2])
    train_modes([run[2]], 1)
    assert run[2].is_compacted
    load(states, *run)
    assert_same(everything(*run[:2]), before)
    train_modes([run[2]], 1)
    run[2].end_epoch()
    other = made(duty=0.0)
    load(states, *other)
    train_modes([other[2]], 1)
    other[2].end_epoch()
    assert_same(everything(*run[:2]), everything(*other[:2]))


# ---- copies, the end


def test_copies_of_the_model_know_nothing_of_the_small_network():
    net, _, method = made()
    one_step(method)
    twin = copy.deepcopy(net)
    torch.save(net, held := io.BytesIO())
    held.seek(0)
    for other in (twin, torch.load(held, weights_only=False)):
        one_step(method) if method.is_compacted else None
        assert method.net is not other
        before = {name: t.clone() for name, t in other.state_dict().items()}
        other.load_state_dict(before)


def test_write_back_serves_averages():
    runs = []
    for mode in ("masked", "compacted"):
        net = chain(dtype=torch.float64)
        optimizer = sgd(net)
        average = AveragedModel(net, avg_fn=lambda a, b, n: (a + b) / 2, use_buffers=True)
        method = GHFP(net, optimizer, **SPARSE, mode=mode, followers=[average])
        for epoch in range(3):
            for x, y in batches(epoch, torch.float64):
                one_step(method, x, y)
                method.write_back()
                average.update_parameters(net)
            method.end_epoch()
        runs.append(average)
    for name, tensor in runs[0].state_dict().items():
        torch.testing.assert_close(runs[1].state_dict()[name], tensor, rtol=1e-8, atol=1e-10)


def hooks(net, optimizer):
    kinds = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_forward_hooks")
    on_modules = [len(getattr(module, kind)) for module in net.modules() for kind in kinds]
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks")
    return on_modules, [len(getattr(optimizer, kind)) for kind in (*kinds, "_optimizer_load_state_dict_pre_hooks")]


def test_detach_gives_everything_back():
    plain = chain(dtype=torch.float64)
    optimizer = sgd(plain)
    before = hooks(plain, optimizer)
    net, optimizer, method = made(
        net=plain, optimizer=lambda _, made=optimizer: made, criterion="mean_activation", rate=0.5
    )
    train_modes([method], 0)
    method.end_epoch()
    one_step(method)
    small = method.net.get_submodule("0").weight.detach().clone()
    method.detach()
    assert method.net is net and method.opt is optimizer and method.mode == "masked"
    assert torch.equal(net[0].weight[net[0].filter_mask], small)
    assert hooks(net, optimizer) == before
