"""Training from scratch: the small network of another run, with new weights, as a run of its own."""

import json

import pytest
import torch

from cases.train import tiny_config
from prunekernels.train import finalize, run
from prunekernels.train.config import Config
from prunekernels.train.loop import Trainer
from prunekernels.train.scratch import begun_run, resumed_run, source_run

pytest.importorskip("sklearn")
COMMON = {"arch": "vgg_small", "width": 0.25, "size": 8, "train_images": 64, "batch": 16, "epochs": 2, "lr": 0.05}
QUIET = {"quiet": True, "report": False}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Little time for steps after the last epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalize, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a run that has pruned half of the filters."""
    out = tmp_path_factory.mktemp("source")
    run.train({**COMMON, **QUIET, "out": str(out), "method": "ghfp", "mode": "masked", "seed": 4})
    return out


def figures(out):
    return json.loads((out / "summary.json").read_text())


def test_it_trains_the_small_network(source, tmp_path):
    summary = run.train({"out": str(tmp_path), "small_of": str(source), **QUIET})
    small = figures(source)
    assert summary["small_parameters"] == small["small_parameters"] < summary["parameters"] == small["parameters"]
    assert summary["small_multiply_adds"] == small["small_multiply_adds"] < summary["multiply_adds"]
    assert summary["accuracy"] == summary["small_accuracy"] and summary["epochs"] == 2
    trained = resumed_run(tmp_path, {})
    assert {name: getattr(trained.config, name) for name in COMMON} == COMMON
    assert (trained.config.seed, trained.config.method, trained.config.duty) == (4, "none", None)
    with source_run(source).masked():
        filters = [int(m.filter_mask.sum()) for m in source_run(source).layers.values()]
    assert [layer.out_channels for layer in trained.layers.values()] == filters


def test_weights_are_new_and_those_of_the_seed(source, tmp_path):
    def weights(**given):
        begun = begun_run({"out": str(tmp_path), "small_of": str(source), **given, **QUIET})
        return torch.cat([p.detach().flatten() for p in begun.model.parameters()])

    first = weights()
    assert torch.equal(first, weights(seed=4)) and not torch.equal(first, weights(seed=5))
    small = torch.load(source / "small.pt", weights_only=False)
    old = torch.cat([p.detach().flatten() for p in small.parameters()])
    assert len(old) == len(first) and float((old - first).abs().mean()) > 0.01


@pytest.mark.slow
def test_a_run_that_stops_goes_on_to_the_same_bits(source, tmp_path):
    given = {"small_of": str(source), "deterministic": True, **QUIET}
    run.train({**given, "out": str(tmp_path / "whole")})
    run.train({**given, "out": str(tmp_path / "parts"), "stop_after": 1})
    run.train({"out": str(tmp_path / "parts"), **QUIET}, resume=True)
    whole, parts = (resumed_run(tmp_path / name, {}).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    run.shrink_run(tmp_path / "parts")
    assert (tmp_path / "parts" / "small.pt").exists()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"arch": "resnet20"},
            "train: arch: expected 'vgg_small', as in .*, whose small network trains, got 'resnet20'",
        ),
        ({"size": 12}, "train: size: expected 8, as in "),
        ({"method": "sfp"}, "train: method: expected none, as the run trains a small network, got 'sfp'"),
    ],
)
def test_settings_that_do_not_fit(source, tmp_path, given, text):
    with pytest.raises(ValueError, match=text):
        run.train({"out": str(tmp_path), "small_of": str(source), **QUIET, **given})


def test_a_run_that_is_not_over_or_not_there(tmp_path):
    run.train({**COMMON, **QUIET, "out": str(tmp_path / "a"), "stop_after": 1})
    with pytest.raises(ValueError, match="small_of: expected a run whose last epoch, 2, is over, got epoch 1 in .*a"):
        run.train({"out": str(tmp_path / "b"), "small_of": str(tmp_path / "a"), **QUIET})
    with pytest.raises(FileNotFoundError, match="nowhere.*got no such file"):
        run.train({"out": str(tmp_path / "b"), "small_of": str(tmp_path / "nowhere"), **QUIET})


def test_a_trainer_of_its_own_needs_the_network(source, tmp_path):
    with pytest.raises(ValueError, match=r"train: model: expected a small network .* train\(\) makes it"):
        Trainer(tiny_config(tmp_path, small_of=str(source)))


def test_any_network(tmp_path):
    """A Trainer trains the network that it is given."""

    def network():
        return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))

    model = network()
    before = model[0].weight.detach().clone()
    trainer = Trainer(Config(str(tmp_path), **COMMON, **QUIET), model=model)
    trainer.run()
    assert trainer.model is model and not torch.equal(model[0].weight, before)
    assert torch.equal(Trainer.resumed(tmp_path, model=network()).model[0].weight, model[0].weight)


@pytest.mark.slow
def test_a_report_beside_others(source, tmp_path):
    """Runs are called by what they are."""
    pytest.importorskip("matplotlib")
    dense, short = str(tmp_path / "dense"), str(tmp_path / "short")
    run.train({**COMMON, **QUIET, "out": dense})
    run.train({"out": short, "small_of": str(source), "epochs": 1, **QUIET})
    beside = [short, dense, str(source), str(source)]
    run.train({"out": str(tmp_path / "a"), "small_of": str(source), "quiet": True, "beside": beside})
    page = (tmp_path / "a" / "report.html").read_text()
    heads = ("dense", "this run", "small network", "scratch, 1 epochs", "ghfp", f"ghfp ({source})")
    assert "".join(f"<th>{head}</th>" for head in heads) in page
    assert Config("a", beside=dense).beside == [dense]  # as one was given before there could be several
