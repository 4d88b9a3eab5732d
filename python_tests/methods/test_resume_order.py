"""Going on from a checkpoint in whatever order: the weights are those that were saved, to the bit."""

import copy
import functools
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import assert_same, batches, chain, residual, sgd, snapshot, train
from prunekernels import methods
from prunekernels.methods import GHFP, SFP, CoarsePruning, Method
from prunekernels.methods.first_pruning import FirstPruning

IMAGES = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(7))
CLASSES = [c for name in methods.__all__ if isinstance(c := getattr(methods, name), type) and issubclass(c, Method)]
OPTIONS = {cls.__name__: (cls, {"example_input": IMAGES}) for cls in CLASSES} | {
    "CoarsePruning": (CoarsePruning, {"example_input": IMAGES, "data": list(batches(99, steps=2)), "masks": 3}),
    "CoarsePruning at once": (CoarsePruning, {"data": list(batches(99, steps=2)), "masks": 3, "start": -1}),
    "hard from the start": (GHFP, {"hard": 1.0}),
    "hidden": (GHFP, {"duty": 0.0, "hard": 0.5}),
    "duty": (SFP, {"duty": 0.5, "scale_norms": True, "alpha": 0.5}),
    "joint": (GHFP, {"coupling": "joint", "example_input": IMAGES}),
    "random": (SFP, {"criterion": "random"}),
}
ORDERS = list(itertools.permutations(("make", "load model", "load optimizer", "load method")))
ORDERS = [order for order in ORDERS if order.index("make") < order.index("load method")]
names = pytest.mark.parametrize("name", OPTIONS)


def start(name, seed=0):
    net = (residual if "joint" in name else chain)(seed)
    return net, sgd(net)


def make(name, net, optimizer, **more):
    cls, options = OPTIONS[name]
    return cls(net, optimizer, 0.5, 5, **options, **more)


def saved(*things):
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], buffer)
    return buffer.getvalue()


def loaded(checkpoint):
    return torch.load(io.BytesIO(checkpoint), weights_only=True)


def everything(net, optimizer, method):
    masks = {f"mask {n}": t.clone() for n, t in net.state_dict().items() if n.endswith("_mask")}
    return snapshot(net, optimizer) | masks | {f"state {n}": t for n, t in method.states.items()}


def first_run(name, epochs):
    net, optimizer = start(name)
    method = make(name, net, optimizer)
    train(net, optimizer, method, epochs)
    return net, optimizer, method


@functools.cache
def recorded(name, epochs):
    """A first run's checkpoint, what it has then, and what it has after one more epoch."""
    first = first_run(name, epochs)
    checkpoint, then = saved(*first), everything(*first)
    train(*first, 1, epochs)
    return checkpoint, then, everything(*first), first[2].history


@pytest.mark.thinned(12)
@pytest.mark.parametrize("epochs", [0, 1, 2, 5])
@pytest.mark.parametrize("order", ORDERS, ids=" > ".join)
@names
def test_any_order(name, order, epochs):
    """Also with the very seed of the first run, so that a first pruning finds the weights it found then."""
    checkpoint, expected, later, history = recorded(name, epochs)
    net, optimizer = start(name, epochs % 2)
    method = None
    for step in order:
        model_state, optimizer_state, method_state = loaded(checkpoint)
        if step == "make":
            method = make(name, net, optimizer)
        elif step == "load model":
            net.load_state_dict(model_state)
        elif step == "load optimizer":
            optimizer.load_state_dict(optimizer_state)
        else:
            method.load_state_dict(method_state)
    assert_same(everything(net, optimizer, method), expected)
    train(net, optimizer, method, 1, epochs)
    assert_same(everything(net, optimizer, method), later)
    assert method.history == history


@pytest.mark.thinned(3)
@pytest.mark.parametrize("epochs", [0, 2, 5])
@pytest.mark.parametrize("first_the_method", [False, True])
@names
def test_state(name, first_the_method, epochs):
    """Method(..., state=...) writes to no weight, whatever the weights are."""
    checkpoint, expected, later, _ = recorded(name, epochs)
    model_state, optimizer_state, method_state = loaded(checkpoint)
    net, optimizer = start(name, 1)
    if not first_the_method:
        net.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
    before = {name: (p, p._version) for name, p in net.named_parameters()}
    method = make(name, net, optimizer, state=method_state)
    assert all(p._version == version for p, version in before.values())
    if first_the_method:
        net.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
    assert_same(everything(net, optimizer, method), expected)
    train(net, optimizer, method, 1, epochs)
    assert_same(everything(net, optimizer, method), later)


@names
def test_a_broadcast_of_the_same_values_changes_nothing(name):
    """DistributedDataParallel writes every parameter when it is made."""
    checkpoint, expected, _, _ = recorded(name, 2)
    model_state, optimizer_state, method_state = loaded(checkpoint)
    net, optimizer = start(name, 1)
    net.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    method = make(name, net, optimizer)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.clone())
    method.load_state_dict(method_state)
    assert_same(everything(net, optimizer, method), expected)


@names
def test_evaluation_before_the_method_is_loaded_changes_nothing(name):
    """Lightning checks the network's outputs before it trains."""
    checkpoint, expected, _, _ = recorded(name, 2)
    model_state, optimizer_state, method_state = loaded(checkpoint)
    net, optimizer = start(name, 1)
    net.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    method = make(name, net, optimizer)
    with torch.no_grad():
        net.eval()(IMAGES)
    method.load_state_dict(method_state)
    assert_same(everything(net, optimizer, method), expected)


@names
def test_a_state_of_ones_own_changes_nothing(name):
    """As frameworks do that ask for a state before they load one into it."""
    net, optimizer, method = first_run(name, 0)
    before = everything(net, optimizer, method)
    method.load_state_dict(copy.deepcopy(method.state_dict()))
    assert_same(everything(net, optimizer, method), before)


@names
def test_training_in_between_is_not_taken_back(name):
    """Going back to an older state of the method leaves weights to the network's own."""
    net, optimizer, method = first_run(name, 0)
    state = copy.deepcopy(method.state_dict())
    train(net, optimizer, method, 2)
    before = snapshot(net, optimizer)
    method.load_state_dict(state)
    assert_same(snapshot(net, optimizer), before)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("state", [{}, 3, {"method": "GHFP"}])
@names
def test_foreign_state(name, state):
    net, optimizer = start(name)
    before, cls = net.state_dict(), OPTIONS[name][0]
    before = {name: value.clone() for name, value in before.items()}
    with pytest.raises(ValueError, match=f"{cls.__name__}.load_state_dict: "):
        make(name, net, optimizer, state=state)
    assert_same(before, net.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# ---- what trainers do


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.randn(3, 6, 6, generator=generator), "labels": i % 4}


class Labelled(nn.Module):
    """A network with the loss inside, as those of transformers have."""

    def __init__(self):
        super().__init__()
        self.net = chain()

    def forward(self, x, labels):
        y = self.net(x)
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def test_trainer_of_transformers(tmp_path):
    """Its callbacks get the optimizer only after the checkpoint is loaded."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("accelerate")

    class Pruning(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **_):
            path = tmp_path / f"checkpoint-{state.global_step}" / "method.pt"
            saved = torch.load(path, weights_only=True) if path.exists() else None
            self.loaded = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.method = GHFP(model, optimizer, 0.5, 4, state=saved)
            self.kept = all(torch.equal(p, self.loaded[name]) for name, p in model.named_parameters())

        def on_step_end(self, *_, **__):
            self.method.step()

        def on_epoch_end(self, args, state, control, **_):
            self.method.end_epoch()

        def on_save(self, args, state, control, **_):
            torch.save(self.method.state_dict(), tmp_path / f"checkpoint-{state.global_step}" / "method.pt")

    def run(**more):
        transformers.set_seed(0)
        model, pruning = Labelled(), Pruning()
        args = transformers.TrainingArguments(
            tmp_path, num_train_epochs=4, per_device_train_batch_size=4, save_strategy="epoch", use_cpu=True,
            report_to=[], disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        optimizer = sgd(model)
        trainer = transformers.Trainer(
            model, args, train_dataset=Images(), callbacks=[pruning],
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )  # fmt: skip
        trainer.train(**more)
        return model, pruning

    model, pruning = run()
    again, resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.kept and resumed.method.history == pruning.method.history
    assert_same(model.state_dict(), again.state_dict())
    assert all(not layer.weight[~layer.filter_mask].any() for layer in resumed.method.layers.values())


@pytest.mark.parametrize("duty", [1.0, 0.5])
def test_lightning(tmp_path, duty):
    """Its steps have closures, its start hook comes after the load, and callbacks have states of their own."""
    lightning = pytest.importorskip("lightning")
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = chain()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return sgd(self)

    class Pruning(lightning.Callback):
        saved = None

        def on_train_start(self, trainer, module):
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            options = {"steps_per_epoch": 3, "duty": duty, "state": self.saved}
            self.method = GHFP(module, module.optimizers(), 0.5, 4, **options)
            self.kept = all(torch.equal(p, before[name]) for name, p in module.named_parameters())

        def on_train_batch_end(self, *_):
            self.method.step()

        def on_train_epoch_end(self, *_):
            self.method.end_epoch()

        def state_dict(self):
            return {"method": self.method.state_dict()}

        def load_state_dict(self, state):
            self.saved = state["method"]

    def run(epochs, **more):
        pruning, module = Pruning(), Module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False,
                enable_model_summary=False, callbacks=[pruning], enable_checkpointing=False,
            )  # fmt: skip
            trainer.fit(module, torch.utils.data.DataLoader(Images(), 4), **more)
        return trainer, module, pruning

    _, module, pruning = run(4)
    trainer, _, _ = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, again, resumed = run(4, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert resumed.kept and resumed.method.history == pruning.method.history
    assert_same(module.state_dict(), again.state_dict())


def test_live_mode():
    checkpoint, expected, _, _ = recorded("SFP", 2)
    model_state, optimizer_state, method_state = loaded(checkpoint)
    net, optimizer = start("SFP", 1)
    pk.flow(net).load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    method = make("SFP", net, optimizer)
    method.load_state_dict(method_state)
    assert_same(everything(net, optimizer, method), expected)


def test_copies_are_taken_back_too():
    """Averages of the model, whose rows die with the model's."""
    net, optimizer = start("SFP")
    average = copy.deepcopy(net)
    before = snapshot(average, optimizer)
    with FirstPruning(net, optimizer, [average]) as first, torch.no_grad():
        for network in (net, average):
            network[0].weight[:2] = 0
        average[1].running_mean[:2] = 3
    with torch.no_grad():
        net[0].weight[:2] = 5  # loaded since
    first.take_back({}, {"weights": 1, "momenta": 1})
    assert_same(snapshot(average, optimizer), before)
    assert bool((net[0].weight[:2] == 5).all())
