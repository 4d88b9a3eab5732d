"""PruningCallback in Lightning's Trainer does what the method does in a loop by hand."""

import copy
import itertools
import os

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import prunekernels as pk
from cases.ranks import run_ranks
from cases.trainers import BATCH, EPOCHS, SOFT, STEPS, Net, assert_same_networks, data, live_counts, loop, sgd

pl = pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install prunekernels[lightning]")
pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|ModelCheckpoint|LeafSpec|isinstance|exists and is not)")


class Module(pl.LightningModule):
    def __init__(self, calls="forward"):
        super().__init__()
        self.net, self.calls = Net(), calls

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x) if self.calls == "forward" else self.net(x), y)

    def validation_step(self, batch, _):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return sgd(self)


class Manual(Module):
    """Two steps of an optimizer a batch."""

    automatic_optimization = False

    def training_step(self, batch, _):
        for x, y in zip(batch[0].split(2), batch[1].split(2), strict=True):
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            self.optimizers().step()


class Loader(torch.utils.data.DataLoader):
    """Goes on from the batch at which it was saved, as torchdata's does."""

    skip = at = 0

    def __iter__(self):
        self.at, self.skip = self.skip, 0
        for batch in itertools.islice(super().__iter__(), self.at, None):
            self.at += 1
            yield batch

    def state_dict(self):
        return {"at": self.at % len(self)}

    def load_state_dict(self, state):
        self.skip = state["at"]


def loader(rank=0):
    return Loader(torch.utils.data.TensorDataset(*data(rank)), batch_size=BATCH)


def trainer(tmp_path, *callbacks, max_epochs=EPOCHS, **options):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return pl.Trainer(
        **{
            "max_epochs": max_epochs, "callbacks": list(callbacks), "accelerator": "cpu", "logger": False,
            "enable_checkpointing": saves, "enable_progress_bar": False, "enable_model_summary": False,
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "devices": 1, **options,
        }
    )  # fmt: skip


def callback(method="sfp", **options):
    from prunekernels.integrations.lightning import PruningCallback

    return PruningCallback(method, **{"mode": "masked", **options})


FORMS = {
    "plain": ({}, {}),
    "clipping": ({"gradient_clip_val": 0.05}, {"max_norm": 0.05}),
    "bfloat16": ({"precision": "bf16-mixed"}, {"bf16": True}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, SOFT], ids=["paper", "soft"])
def test_is_the_loop(form, options, tmp_path):
    ours, theirs = FORMS[form]
    module = Module()
    pruned = callback(**options)
    trainer(tmp_path, pruned, **ours).fit(module, loader())
    net, method, _ = loop("SFP", **theirs, **options)
    assert_same_networks(module.net, net)
    counts, expected = ([list(row.values()) for row in each.history] for each in (pruned.method, method))
    assert counts == expected and pruned.method.epoch == EPOCHS
    assert live_counts(module) == [4, 3]


def test_float16(tmp_path):
    """With a scale at first so large that steps are left out."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**26)

    module, pruned = Module(), callback(**SOFT)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer(tmp_path, pruned, plugins=[plugin], gradient_clip_val=0.5).fit(module, loader())
    net, _, _ = loop("SFP", scaler=scaler(), max_norm=0.5, **SOFT)
    assert 1 < plugin.scaler.get_scale() < 2.0**26
    assert_same_networks(module.net, net)


def test_live_mode(tmp_path):
    module = Module()
    trainer(tmp_path, callback(mode="live", **SOFT)).fit(module, loader())
    assert_same_networks(module.net, loop("SFP", live=True, **SOFT)[0])


@pytest.mark.parametrize("calls", ["forward", "net"])
def test_auto_measures(calls, tmp_path):
    """Whichever module the training step calls."""
    module, pruned = Module(calls), callback("ghfp", mode="auto", duty=0.0)
    trainer(tmp_path, pruned).fit(module, loader(), loader())
    assert set(pruned.pruning.chosen) and set(pruned.pruning.chosen.values()) <= {"masked", "live"}
    assert pruned.pruning.now in ("masked", "live")
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    copy.deepcopy(module)


def test_every_step_of_manual_optimization_counts(tmp_path):
    pruned = callback(**SOFT)
    steps = []
    pruned.pruning.step = lambda original=pruned.pruning.step: steps.append(original())
    trainer(tmp_path, pruned).fit(Manual(), loader())
    assert len(steps) == 2 * STEPS * EPOCHS


SAVES = {
    "at an epoch's end": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "after a validation": {"monitor": "loss", "save_on_train_epoch_end": False},
    "in an epoch": {"every_n_train_steps": STEPS // 2, "save_top_k": -1},
    "at an epoch's last step": {"every_n_train_steps": STEPS, "save_top_k": -1},
}


@pytest.mark.parametrize("when", SAVES)
@pytest.mark.parametrize("options", [{}, SOFT], ids=["paper", "soft"])
def test_resume(when, options, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def save():
        return ModelCheckpoint(tmp_path / "kept", filename="{epoch}-{step}", **SAVES[when])

    whole, resumed, at = Module(), Module(), {"in an epoch": 3 * STEPS // 2}.get(when, 2 * STEPS)
    trainer(tmp_path, callback(**options), save()).fit(whole, loader(), loader())
    (path,) = (tmp_path / "kept").glob(f"*step={at}.ckpt") if when != "after a validation" else [None]
    if path is None:
        trainer(tmp_path, callback(**options), save(), max_epochs=2).fit(Module(), loader(), loader())
        path = max((tmp_path / "kept").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    pruned = callback(**options)
    trainer(tmp_path, pruned).fit(resumed, loader(), loader(), ckpt_path=path)
    assert pruned.method.epoch == EPOCHS
    assert_same_networks(resumed, whole)


def test_begins_in_a_training_that_resumes(tmp_path):
    """It then has the epochs that are left; and it resumes as any other."""
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(Module(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    pruned, again, modules = callback(), callback(), (Module(), Module())
    half = trainer(tmp_path, pruned, max_epochs=4, limit_train_batches=STEPS)
    half.fit(modules[0], loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert pruned.method.all_epochs == 3 and pruned.method.finished and live_counts(modules[0]) == [4, 3]
    half.save_checkpoint(tmp_path / "pruned.ckpt")
    longer = trainer(tmp_path, again, max_epochs=5)
    longer.fit(modules[1], loader(), ckpt_path=tmp_path / "pruned.ckpt")
    assert again.method.all_epochs == again.method.epoch == 4


@pytest.mark.parametrize("first", ["average", "pruning"])
def test_weight_averaging_follows(first, tmp_path):
    from lightning.pytorch.callbacks import WeightAveraging

    averaging, pruned, module = WeightAveraging(avg_fn=get_ema_avg_fn(0.9)), callback(**SOFT), Module()
    callbacks = [averaging, pruned] if first == "average" else [pruned, averaging]
    trainer(tmp_path, *callbacks).fit(module, loader(), loader())
    assert live_counts(module) == live_counts(averaging._average_model) == [4, 3]
    expected = loop("SFP", average=lambda net: AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True), **SOFT)
    for name, value in expected[2].module.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value)


def two_ranks(rank, tmp_path):
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    module, pruned = Module(), callback("pgp", mode="auto", duty=0.5, fine_tune=1)
    trainer(
        tmp_path, pruned, devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()], use_distributed_sampler=False
    ).fit(module, loader(rank))
    pk.check_same_masks(module)
    return {"net": module.net.state_dict(), "chosen": pruned.pruning.chosen, "live": live_counts(module)}


def test_two_processes(tmp_path):
    first, second = run_ranks(two_ranks, 2, tmp_path)
    assert first["live"] == second["live"] == [4, 3]
    assert first["chosen"] == second["chosen"] and first["chosen"]
    for name, value in first["net"].items():
        if "running" not in name:
            assert torch.equal(value, second["net"][name]), name


def test_tests_what_it_trained(tmp_path):
    """The checkpoint loads into a new module, which the callback converts first."""
    module = Module()
    fitted = trainer(tmp_path, callback(**SOFT))
    fitted.fit(module, loader(), loader())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    again = Module()
    (row,) = trainer(tmp_path, callback()).validate(again, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    (expected,) = fitted.validate(module, loader(), verbose=False)
    assert row["loss"] == pytest.approx(expected["loss"]) and live_counts(again) == [4, 3]


def test_joint_coupling_by_the_modules_own_example(tmp_path):
    module = Module()
    module.example_input_array = torch.randn(2, 3, 8, 8)
    pruned = callback("ghfp", coupling="joint", mode="live")
    trainer(tmp_path, pruned).fit(module, loader())
    assert len(pruned.method.units) == 2 and live_counts(module) == [4, 3]
    small = pk.shrink(module.net.eval(), torch.randn(2, 3, 8, 8))
    assert [conv.out_channels for conv in small.modules() if isinstance(conv, torch.nn.Conv2d)] == [4, 3]


def test_epochs_have_to_be_known(tmp_path):
    with pytest.raises(ValueError, match="PruningCallback: epochs: expected a number of epochs"):
        trainer(tmp_path, callback(), max_epochs=-1, max_steps=3).fit(Module(), loader())
    module, pruned = Module(), callback(epochs=1)
    trainer(tmp_path, pruned, max_epochs=-1, max_steps=STEPS).fit(module, loader())
    assert pruned.method.finished


def test_another_methods_state_is_refused(tmp_path):
    fitted = trainer(tmp_path, callback(), max_epochs=2)
    fitted.fit(Module(), loader())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="method: expected GHFP, got SFP"):
        trainer(tmp_path, callback("ghfp")).fit(Module(), loader(), ckpt_path=tmp_path / "last.ckpt")
