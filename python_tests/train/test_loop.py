"""Trainer: epochs, modes and methods; a run that stops goes on to the same bits."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.train import comparable, tiny_config, tiny_data, tiny_run
from prunekernels.train import checkpoint
from prunekernels.train.data import train_batches
from prunekernels.train.loop import Trainer, learning_rate
from prunekernels.train.setup import class_of, known_methods, method_of, network, optimizer_of

METHODS = [name for name in known_methods() if name != "none"]


@pytest.mark.parametrize(
    ("method", "mode", "duty", "amp"),
    [
        ("none", "dense", None, False),
        ("ghfp", "live", 0.34, False),
        ("ghfp", "masked", 0.34, True),
        ("sfp", "dense", None, False),
        ("asfp", "live", 1.0, False),
        ("rpgp", "live", 0, True),
        ("prune-while-training", "live", None, False),
        ("ghfp", "compacted", 0.34, False),
        ("pgp", "compacted", None, True),
        ("csgd", "compacted", None, False),
        ("rpgp", "auto", 0, False),
    ],
)
def test_two_epochs_and_one_more_are_three(tmp_path, method, mode, duty, amp):
    given = {"method": method, "mode": mode, "duty": duty, "amp": amp, "deterministic": True, "augment": "shift"}
    whole = tiny_run(tmp_path / "whole", **given)
    whole.run()
    tiny_run(tmp_path / "parts", stop_after=2, **given).run()
    torch.rand(3)  # the state of a new process is another
    parts = Trainer.resumed(tmp_path / "parts", data=tiny_data())
    assert parts.epoch == 2
    parts.run()
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    assert states[1]["epoch"] == 3 and comparable(states[0]) == comparable(states[1])


@pytest.mark.parametrize(
    ("method", "arch"), [*((method, "vgg_small") for method in METHODS), ("ghfp", "resnet20"), ("csgd", "resnet20")]
)
def test_methods(tmp_path, method, arch):
    run = tiny_run(tmp_path, method=method, arch=arch, rate=0.5, width=0.5)
    run.run()
    counts = [torch.bincount(states.long(), minlength=3) for states in run.states]
    share = run.history[-1]["live"]
    assert share == float(counts[-1][0]) / len(run.states[-1]) and 0.5 <= share < 1
    assert counts[-1][1] == 0  # after the last epoch what is dead stays so
    again = Trainer.resumed(tmp_path, data=tiny_data())
    assert torch.equal(again.states[-1], run.states[-1]) and again.method.history == run.method.history


@pytest.mark.parametrize("mode", ["live", "dense", "compacted"])
def test_measure_is_an_extra_pass(tmp_path, mode):
    """Scores by the gradients of the whole training set at the epoch's end; weights, statistics and gradients stay."""
    seen = []

    def watched(measure):
        run = tiny_run(tmp_path, method="pgp", mode=mode, deterministic=True, measure=measure)
        end = run.method.end_epoch

        def end_epoch():
            seen.append({name: total.clone() for name, total in run.method.criterion.sums.items()})
            return end()

        run.method.end_epoch = end_epoch
        run.run_epoch()
        return run

    plain, measured = watched(False), watched(True)
    assert plain.history[0]["loss"] == measured.history[0]["loss"]
    run = tiny_run(tmp_path, method="none", mode="dense" if mode == "compacted" else mode, deterministic=True)
    run.run_epoch()
    expected = {name: torch.zeros_like(layer.weight) for name, layer in run.layers.items()}
    run.model.eval()
    for x, y in train_batches(run.data, run.config.batch, run.config.seed, 0, "none"):
        run.model.zero_grad()
        torch.nn.functional.cross_entropy(run.model(run.data.normalised(x)), y).backward()
        for name, layer in run.layers.items():
            expected[name] += layer.weight.grad
    for name, total in expected.items():
        torch.testing.assert_close(seen[1][name], total, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(seen[0][name], total, rtol=1e-2, atol=1e-5)


def test_modes_agree():
    """The same steps in every mode, to rounding."""
    losses = []
    for mode in ("live", "masked", "dense", "compacted", "auto"):
        run = tiny_run("unused", method="ghfp", mode=mode, duty=0, deterministic=True, options={"hard": 1.0})
        run.run_epoch()
        losses.append(run.history[0]["loss"])
        assert run.history[0]["computed"] < 0.6
    torch.testing.assert_close(losses, [losses[0]] * 5, rtol=1e-3, atol=0)


def test_plain_network_without_method():
    run = tiny_run("unused", mode="dense")
    assert not any(isinstance(m, pk.MaskedConv2d) for m in run.model.modules())
    assert type(run.optimizer) is torch.optim.SGD


def test_it_learns(tmp_path):
    run = tiny_run(tmp_path, epochs=6, lr=0.1)
    run.run()
    assert run.history[-1]["accuracy"] > 0.9
    assert run.history[-1]["images_per_s"] > 0 and len(run.states) == 6


def test_progress_is_printed(capsys):
    tiny_run("unused", quiet=False).run_epoch()
    assert capsys.readouterr().out.startswith("epoch 1/3  loss ")


def test_learning_rate():
    config = tiny_config("unused", epochs=10, lr=0.2)
    assert [learning_rate(config, e) for e in (0, 5, 10)] == pytest.approx([0.2, 0.1, 0])


# Bad input


def test_a_loss_that_is_no_number(tmp_path):
    tiny_run(tmp_path, stop_after=1).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run = Trainer.resumed(tmp_path, data=tiny_data())
    with torch.no_grad():
        run.model.classifier.weight[0] = float("nan")
    text = r"train: loss: expected a finite number, got nan in epoch 2, step 1, at lr 0.0\d+; .*epoch 1 is kept"
    with pytest.raises(FloatingPointError, match=text):
        run.run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_no_number_at_first(tmp_path):
    run = tiny_run(tmp_path / "a", lr=1e30)
    with pytest.raises(FloatingPointError, match="in epoch 1, step .*; nothing was written"):
        run.run()
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


@pytest.mark.parametrize("given", [{"arch": "resnet20"}, {"method": "sfp"}, {"width": 0.5}, {"seed": 1}])
def test_resume_as_another_run(tmp_path, given):
    tiny_run(tmp_path, method="ghfp", stop_after=1).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"train: {name}: expected .*, as in .*checkpoint.pt, got {given[name]!r}"):
        Trainer.resumed(tmp_path, given, data=tiny_data())
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_without_any_of_its_parts_is_foreign(tmp_path):
    assert sorted(tiny_run(tmp_path).state()) == sorted(checkpoint.KEYS)


def damage(state, what):
    if what == "data":
        state["data"] = "60 + 15 images, crc 00c0ffee"
    elif what == "layers":
        state["layers"]["stage1_1.conv"] += 1
    elif what == "model":
        state["model"].pop("stage1_1.conv.weight")
    elif what == "optimizer":
        state["optimizer"]["param_groups"][0]["params"].pop()
    else:
        state["method"]["method"] = "SFP"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("data", r"expected its data, 60 \+ 15 images, crc 00c0ffee, got 48 \+ 16 images, crc ........"),
        ("layers", "expected the layers of vgg_small, got those of another network"),
        ("model", "expected this run's state, got RuntimeError: .*stage1_1.conv.weight"),
        ("optimizer", "expected this run's state, got ValueError: .*parameter group"),
        ("method", "expected this run's state, got ValueError: GHFP.*: method: expected GHFP, got SFP"),
    ],
)
def test_resume_from_a_changed_checkpoint(tmp_path, what, text):
    tiny_run(tmp_path, method="ghfp", stop_after=1).run()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    damage(state, what)
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match=rf"(?s)train: resume: .*checkpoint.pt: {text}"):
        Trainer.resumed(tmp_path, data=tiny_data())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"device": "cuda:77"}, r"train: device: expected one that is here, got 'cuda:77' \("),
        ({"device": "abacus"}, r"train: device: expected one that is here, got 'abacus' \("),
        ({"method": "magic"}, "train: method: expected one of none, .*ghfp.*, got 'magic'"),
        ({"duty": 0.5}, "train: method: expected one that prunes, .*, got 'none'"),
        ({"method": "rpgp", "measure": True}, "train: measure: expected the method pgp, got 'rpgp'"),
        (
            {"method": "ghfp", "options": {"harder": 1}},
            "train: ghfp: expected options among hard, schedule, .*, got 'harder'",
        ),
        ({"method": "ghfp", "options": {"hard": 2.0}}, r"GHFP: hard: expected a number in \[0, 1\].*, got 2.0"),
    ],
)
def test_devices_and_methods_that_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        tiny_run("unused", **given)


def test_a_method_needs_masked_layers_and_its_optimizer():
    config, data = tiny_config("unused", method="ghfp"), tiny_data()
    plain = network(config, data)
    with pytest.raises(ValueError, match=r"GHFP: model: expected MaskedConv2d layers \(see pk.convert\), got none"):
        method_of(config, plain, optimizer_of(config, plain), data)
    pk.convert(plain)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="GHFP: optimizer: expected one over the model's parameters"):
        method_of(config, plain, other, data)


def test_names_of_methods():
    assert class_of(tiny_config("unused", method="prune-while-training")).__name__ == "PruneWhileTraining"
    assert {"none", "sfp", "ghfp", "pgp"} <= set(known_methods())
