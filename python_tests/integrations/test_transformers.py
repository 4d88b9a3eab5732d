"""PruningCallback in the Trainer of transformers does what the method does in a loop by hand."""

import os
import shutil

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import prunekernels as pk
from cases.ranks import run_ranks
from cases.trainers import BATCH, EPOCHS, SOFT, STEPS, Net, assert_same_networks, data, live_counts, loop, sgd

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install prunekernels[transformers]")
pytest.importorskip("accelerate", reason="needs accelerate: pip install prunekernels[transformers]")


def images(rank=0):
    return [{"pixel_values": x, "labels": y} for x, y in zip(*data(rank), strict=True)]


class InOrder(transformers.Trainer):
    """Takes the images in order, as the loop does."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(tmp_path, net, *callbacks, epochs=EPOCHS, rank=0, **options):
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path), "num_train_epochs": epochs, "per_device_train_batch_size": BATCH,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
            "logging_strategy": "no", "dataloader_pin_memory": False, **options,
        }
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR
    optimizer = sgd(net)
    return InOrder(
        net, arguments, train_dataset=images(rank), callbacks=list(callbacks),
        optimizers=(optimizer, constant(optimizer, lambda step: 1.0)),
    )  # fmt: skip


def callback(method="sfp", **options):
    from prunekernels.integrations.transformers import PruningCallback

    return PruningCallback(method, **{"mode": "masked", **options})


FORMS = {
    "plain": ({}, {}),
    "clipping": ({"max_grad_norm": 0.05}, {"max_norm": 0.05}),
    "bfloat16": ({"bf16": True}, {"bf16": True}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, SOFT], ids=["paper", "soft"])
def test_is_the_loop(form, options, tmp_path):
    ours, theirs = FORMS[form]
    net, pruned = Net(), callback(**options)
    training = trainer(tmp_path, net, pruned, **ours)
    training.train()
    expected, method, _ = loop("SFP", **theirs, **options)
    assert pruned.method.history == method.history and pruned.method.epoch == EPOCHS
    if form == "clipping":  # the norm is computed by other operators
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value)
    else:
        assert_same_networks(net, expected)
    assert live_counts(net) == [4, 3]
    assert training.args.max_grad_norm == ours.get("max_grad_norm", 0.0)


def test_live_mode(tmp_path):
    net = Net()
    trainer(tmp_path, net, callback(mode="live", **SOFT)).train()
    assert_same_networks(net, loop("SFP", live=True, **SOFT)[0])


def test_auto_measures(tmp_path):
    net, pruned = Net(), callback("ghfp", mode="auto", duty=0.0)
    trainer(tmp_path, net, pruned, bf16=True).train()
    assert set(pruned.pruning.chosen) and set(pruned.pruning.chosen.values()) <= {"masked", "live"}


SAVES = {
    "at an epoch's end": ({"save_strategy": "epoch"}, 2 * STEPS),
    "in an epoch": ({"save_strategy": "steps", "save_steps": 2}, 3 * STEPS // 2),
    "at an epoch's last step": ({"save_strategy": "steps", "save_steps": STEPS}, 2 * STEPS),
}


@pytest.mark.parametrize("when", SAVES)
@pytest.mark.parametrize("options", [{}, SOFT], ids=["paper", "soft"])
def test_resume(when, options, tmp_path):
    saves, at = SAVES[when]
    whole, resumed = Net(), Net(seed=1)
    trainer(tmp_path / "whole", whole, callback(**options), **saves).train()
    pruned = callback(**options)
    if when == "in an epoch":  # from wherever it was saved
        (tmp_path / "resumed").mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", tmp_path / "resumed" / f"checkpoint-{at}")
        folder = tmp_path / "resumed"
    else:
        folder = tmp_path / "whole"
    trainer(folder, resumed, pruned).train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    assert pruned.method.epoch == EPOCHS
    assert_same_networks(resumed, whole)


def test_resume_from_elsewhere(tmp_path):
    whole, resumed = Net(), Net(seed=1)
    trainer(tmp_path / "whole", whole, callback(), save_strategy="epoch").train()
    folder = tmp_path / "whole" / f"checkpoint-{2 * STEPS}"
    with pytest.raises(FileNotFoundError, match=r"PruningCallback: resume_from: expected a folder with pruning.pt"):
        trainer(tmp_path / "other", Net(), callback()).train(resume_from_checkpoint=str(folder))
    trainer(tmp_path / "other", resumed, callback(resume_from=folder)).train(resume_from_checkpoint=str(folder))
    assert_same_networks(resumed, whole)


def test_begins_in_a_training_that_resumes(tmp_path):
    """It then has the epochs that are left."""
    trainer(tmp_path, Net(), epochs=EPOCHS, save_strategy="epoch").train()
    net, pruned = Net(seed=1), callback(resume_from=False)
    trainer(tmp_path, net, pruned).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert pruned.method.all_epochs == EPOCHS - 1 and pruned.method.finished and live_counts(net) == [4, 3]


class Averaging(transformers.TrainerCallback):
    def __init__(self, average):
        self.average = average

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.update_parameters(model)


def test_an_average_follows(tmp_path):
    def average(net):
        return AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)

    net = Net()
    pk.convert(net)  # before the copy is made
    mean = average(net)
    trainer(tmp_path, net, callback(followers=[mean], **SOFT), Averaging(mean)).train()
    expected = loop("SFP", average=average, **SOFT)[2]
    assert live_counts(mean) == [4, 3]
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(mean.module.state_dict()[name], value)


def two_ranks(rank, tmp_path):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    net, pruned = Net(), callback("pgp", mode="auto", duty=0.5, fine_tune=1)
    training = trainer(tmp_path, net, pruned, ddp_backend="gloo", save_strategy="epoch", max_grad_norm=1.0)
    training.train()
    assert training.args.world_size == 2 and type(training.model_wrapped) is nn.parallel.DistributedDataParallel
    pk.check_same_masks(net)
    again, other = Net(seed=1), callback("pgp", mode="auto", duty=0.5, fine_tune=1)
    trainer(tmp_path, again, other, ddp_backend="gloo").train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}")  # half as many steps an epoch
    )
    pk.check_same_masks(again)
    return {"net": net.state_dict(), "chosen": pruned.pruning.chosen, "live": live_counts(net) + live_counts(again)}


def test_two_processes(tmp_path):
    first, second = run_ranks(two_ranks, 2, tmp_path)
    assert first["live"] == second["live"] == [4, 3, 4, 3]
    assert first["chosen"] == second["chosen"] and first["chosen"]
    for name, value in first["net"].items():
        if "running" not in name:
            assert torch.equal(value, second["net"][name]), name


def test_a_model_of_theirs(tmp_path):
    """ResNet: joint masks, checkpoints by save_pretrained, the small network."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    net = transformers.ResNetForImageClassification(config)
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="epoch", logging_strategy="no",
    )  # fmt: skip
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(16)]
    pruned = callback("ghfp", mode="live", example_input=x, coupling="joint")
    transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[pruned]).train()
    small = pk.shrink(net.eval(), x)
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in net.parameters())
    plain = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-4").eval()
    torch.testing.assert_close(plain(**x).logits, net(**x).logits, rtol=1e-4, atol=1e-5)
