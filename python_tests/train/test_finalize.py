"""After the last epoch: the small network, its figures and its files."""

import json

import pytest
import torch

from cases.train import tiny_run
from prunekernels.train.finalize import finalize_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("run"), method="ghfp", width=0.5)
    run.run()
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    return run, finalize_run(run), before


def test_summary(finished):
    run, summary, _ = finished
    assert summary["small_parameters"] < summary["parameters"]
    assert summary["small_multiply_adds"] < 0.6 * summary["multiply_adds"]
    assert summary["accuracy"] == summary["small_accuracy"] and summary["agreed"] == summary["test_images"] == 16
    assert set(summary["epoch_of"]) == {"dense", "this", "small"} and min(summary["epoch_of"].values()) > 0
    assert summary["accuracy"] == run.history[-1]["accuracy"] and summary["validation_accuracy"] is None
    assert summary["checked"].startswith("shrink: ")
    assert json.loads((run.out / "summary.json").read_text()) == summary


def test_small_network_is_saved(finished):
    run, summary, _ = finished
    small = torch.load(run.out / "small.pt", weights_only=False)
    assert sum(p.numel() for p in small.parameters()) == summary["small_parameters"]
    x = run.data.normalised(run.data.test.images)
    with run.masked(), torch.no_grad():
        torch.testing.assert_close(small(x), run.model.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_run_stays_as_it_was(finished):
    run, _, before = finished
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = tiny_run(tmp_path, arch="vgg_small", method="ghfp", epochs=1, onnx=True)
    run.run()
    finalize_run(run)
    session = onnxruntime.InferenceSession(run.out / "small.onnx")
    x = run.data.normalised(run.data.test.images[:5])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), run.model.eval()(x), rtol=1e-3, atol=1e-4)
