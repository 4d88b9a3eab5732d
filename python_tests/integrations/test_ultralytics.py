"""add_pruning in the trainer of ultralytics: a YOLO from its yaml, a data set of eight images, nothing downloaded."""

import pytest
import torch

import prunekernels as pk
from cases.ranks import run_ranks
from cases.trainers import live_counts
from cases.yolo import arguments, go_offline, two_ranks, write_model

go_offline()
ultralytics = pytest.importorskip("ultralytics", reason="needs ultralytics: pip install prunekernels[ultralytics]")

X = torch.rand(2, 3, 64, 64)


def yolo(folder):
    folder.mkdir(exist_ok=True)
    return ultralytics.YOLO(write_model(folder), verbose=False)


def train(folder, method="ghfp", *, epochs=2, options=None, **pruning):
    from prunekernels.integrations.ultralytics import add_pruning

    torch.manual_seed(0)
    model = yolo(folder)
    callback = add_pruning(model, method, **{"mode": "masked", **pruning})
    model.train(**arguments(folder, epochs=epochs, **(options or {})))
    return model, callback


def plain_layers(network):
    return not any(isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for m in network.modules())


def share(network):
    counts = [(int(c.filter_mask.sum()), c.out_channels) for c in network.values()]
    return sum(live for live, _ in counts) / sum(total for _, total in counts)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("method, options", [("ghfp", {}), ("pgp", {"duty": 0.5, "fine_tune": 0})])
def test_trains_shrinks_and_exports(method, options, tmp_path):
    from prunekernels.integrations.ultralytics import shrink

    runtime = pytest.importorskip("onnxruntime")
    model, callback = train(tmp_path, method, coupling="joint", **options)
    assert callback.method.finished and 0.45 < share(callback.method.layers) < 0.6
    trained = callback.method.model
    assert any(name.startswith("model.9.") for name in callback.method.left_out)  # the head's outputs
    # model.train() hands back the best network, by its file: plain, with zeros
    assert plain_layers(model.model)
    before, dense = model.model.eval()(X)[0], parameters(model.model)
    small = shrink(model)
    assert small is model.model and parameters(small) < 0.6 * dense
    torch.testing.assert_close(small.eval()(X)[0], before, rtol=1e-3, atol=1e-3)
    assert live_counts(trained) == live_counts(trainer_ema(model))

    model.predict(torch.rand(1, 3, 64, 64), verbose=False)
    model.save(tmp_path / "small.pt")
    again = ultralytics.YOLO(tmp_path / "small.pt")
    torch.testing.assert_close(again.model.float().eval()(X)[0], before, rtol=0.05, atol=1.0)  # in half precision
    file = model.export(format="onnx", imgsz=64, simplify=False, opset=17)
    session = runtime.InferenceSession(file)
    (got,) = session.run(None, {session.get_inputs()[0].name: X[:1].numpy()})
    expected = small.cpu().float().eval()(X[:1])[0]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-2, atol=1e-2)


def trainer_ema(model):
    return model.trainer.ema.ema


def test_converting_before_is_lost_and_does_not_matter(tmp_path):
    """The trainer builds another network."""
    from prunekernels.integrations.ultralytics import add_pruning

    model = yolo(tmp_path)
    pk.convert(model.model)
    network, callback = model.model, add_pruning(model, "ghfp", mode="live")
    model.train(**arguments(tmp_path))
    assert callback.method.model is not network and callback.method.finished


def test_checkpoints_open_without_us_and_shrink_later(tmp_path):
    from prunekernels.integrations.ultralytics import shrink

    model, callback = train(tmp_path, options={"save_period": 1})
    folder = model.trainer.wdir
    assert {file.name for file in folder.iterdir()} >= {"last.pt", "best.pt", "epoch0.pt", "epoch1.pt"}
    for file in folder.iterdir():
        loaded = ultralytics.YOLO(file)
        assert plain_layers(loaded.model) and set(loaded.ckpt["prunekernels"]) == {"state", "masks"}
    fused, whole = ultralytics.YOLO(folder / "last.pt").model, ultralytics.YOLO(folder / "last.pt").model
    torch.testing.assert_close(fused.fuse(verbose=False).eval()(X)[0], whole.eval()(X)[0], rtol=1e-3, atol=1e-2)
    loaded = ultralytics.YOLO(folder / "last.pt")
    dense = parameters(loaded.model)
    assert parameters(shrink(loaded, imgsz=64)) < dense
    with pytest.raises(ValueError, match="shrink: model: expected one that add_pruning has pruned"):
        shrink(yolo(tmp_path / "other"))


def test_the_best_network_has_the_last_masks(tmp_path):
    """Less pruned networks of earlier epochs may be better, and are not what was asked for."""
    from prunekernels.integrations.ultralytics import add_pruning

    model = yolo(tmp_path)
    callback = add_pruning(model, "ghfp", mode="masked", fine_tune=1)
    fitness = iter([0.9, 0.8, 0.3, 0.4, 0.2])

    def falling(trainer):
        trainer.validator.metrics  # noqa: B018
        trainer.validate = lambda: _validated(trainer, next(fitness))

    model.add_callback("on_train_start", falling)
    model.train(**arguments(tmp_path, epochs=4))
    saved = torch.load(model.trainer.best, weights_only=False)
    assert model.trainer.best_fitness == 0.4 and saved["prunekernels"]["state"]["method"]["epoch"] == 4
    assert callback.method.finished


def _validated(trainer, fitness):
    """As BaseTrainer.validate, with another fitness."""
    if trainer.best_fitness is None or trainer.best_fitness < fitness:
        trainer.best_fitness = fitness
    return {}, fitness


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"duty": 0.5, "clip": True, "alpha": 0.0, "wake": "together"}], ids=str)
def test_resume(options, tmp_path):
    from prunekernels.integrations.ultralytics import add_pruning

    model = yolo(tmp_path)
    first = add_pruning(model, "sfp", mode="masked", **options)

    def crash(trainer):
        if trainer.epoch == 2:
            raise Stop

    model.add_callback("on_train_epoch_start", crash)
    with pytest.raises(Stop):
        model.train(**arguments(tmp_path, epochs=4))
    last = model.trainer.last
    states = {name: value.clone() for name, value in first.method.states.items()}
    again = ultralytics.YOLO(last)
    second = add_pruning(again, "sfp", mode="masked", **options)
    seen = []
    again.add_callback("on_train_start", lambda trainer: seen.append((second.method.epoch, second.method.states)))
    again.train(resume=True)
    ((epoch, found),) = seen
    assert epoch == 2 and all(torch.equal(found[name], value) for name, value in states.items())
    assert second.method.epoch == 4 and second.method.history[:2] == first.method.history[:2]
    assert live_counts(second.method.model) == live_counts(trainer_ema(again))


def test_recovers_from_nan(tmp_path):
    """The trainer goes back to last.pt; so does the method."""
    from prunekernels.integrations.ultralytics import add_pruning

    model = yolo(tmp_path)
    callback = add_pruning(model, "ghfp", mode="masked")
    epochs, happened = [], []

    def spoil(trainer):
        epochs.append((trainer.epoch, callback.method.epoch))
        if trainer.epoch == 1 and not happened:
            happened.append(True)
            trainer.loss = torch.tensor(float("nan"))

    model.add_callback("on_train_epoch_end", spoil)
    model.train(**arguments(tmp_path, epochs=3))
    assert epochs == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert live_counts(callback.method.model) == live_counts(trainer_ema(model))


FORMS = {
    "plain": ({}, {"mode": "live"}),
    "bfloat16": ({}, {"mode": "live"}),
    "accumulation": ({"nbs": 8}, {"duty": 0.5}),
    "auto": ({"deterministic": False}, {"mode": "auto", "duty": 0.0}),
    "repeatable": ({}, {"mode": "auto", "duty": 0.0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path, monkeypatch):
    """Each step of the optimizer counts once; the EMA has the masks of the network."""
    from prunekernels.integrations.ultralytics import add_pruning

    options, pruning = FORMS[form]
    if form == "bfloat16":  # which ultralytics has for GPUs alone
        autocast = "ultralytics.engine.trainer.autocast"
        monkeypatch.setattr(autocast, lambda *args, **options: torch.autocast("cpu", torch.bfloat16))
    model, steps = yolo(tmp_path), []
    callback = add_pruning(model, "ghfp", **{"mode": "masked", **pruning})

    def count(trainer):
        trainer.optimizer.register_step_pre_hook(lambda *_: steps.append(callback.method.steps))

    model.add_callback("on_train_start", count)
    model.train(**arguments(tmp_path, **options))
    assert steps == ([0, 0] if form == "accumulation" else [0, 1, 0, 1])
    assert live_counts(callback.method.model) == live_counts(trainer_ema(model))
    assert all(torch.isfinite(p).all() for p in callback.method.model.parameters())
    assert bool(callback.pruning.chosen) == (form == "auto")
    assert form != "repeatable" or callback.pruning.now == "live"


def test_two_processes(tmp_path):
    arguments(tmp_path)  # writes the data
    first, second = run_ranks(two_ranks, 2, tmp_path)
    assert first["live"] == second["live"]
    for name, value in first["net"].items():
        if "running" not in name:
            assert torch.equal(value, second["net"][name]), name
