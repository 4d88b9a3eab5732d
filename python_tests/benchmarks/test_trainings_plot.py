"""benchmarks/trainings/plot.py: which runs are shown where, and the files."""

import pytest

from cases.trainings import training_row as row
from trainings.plot import kind_of, mean, pareto, points, write_plot

ROWS = [
    row(kind="dense", points=92.0, seconds=99.0), row(points=90.0, seconds=20.0),
    row(points=91.0, seconds=30.0, seed=1), row(method="sfp", points=89.0),
    row(method="sfp", kind="literal", points=91.0, seconds=60.0, duty=1.0), row(kind="scratch", points=88.0),
    row(kind="scratch", points=89.0, epochs=16), row(rate=0.3, points=1.0), row(duty=0.5, points=1.0, kind="sweep"),
]  # fmt: skip


def test_points():
    """Wall-clock over dense training of as many epochs as the shortest run; plain networks in their fastest form."""
    found = points(ROWS[:7])
    assert found["dense", "none", "", 8] == [(1.0, pytest.approx(92))]
    assert found["method", "ghfp", "", 8] == [(0.5, pytest.approx(90)), (0.75, pytest.approx(91))]
    assert found["scratch", "none", "100-a", 8] == [(0.5, pytest.approx(88))]
    assert found["scratch-time", "none", "100-a", 16] == [(1.0, pytest.approx(89))]
    assert found["literal", "sfp", "", 8] == [(1.5, pytest.approx(91))]
    assert mean(found["method", "ghfp", "", 8]) == (0.625, pytest.approx(90.5))
    assert kind_of(ROWS[6], 16) == "scratch"


def test_pareto_front():
    at = {"a": (1.0, 90.0), "b": (2.0, 89.0), "c": (3.0, 91.0), "d": (1.0, 89.5), "e": (3.0, 91.0), "f": (0.5, 80.0)}
    groups = {(name, "", "", 8): point for name, point in at.items()}
    assert [group[0] for group in pareto(groups)] == ["f", "a", "c"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"p.{suffix}"
    write_plot(path, [*ROWS, row(arch="resnet20", came_back=[None] * 8)], 0.5, 0.1)
    text = path.read_bytes()
    assert text.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in text
    write_plot(tmp_path / f"none.{suffix}", [row(rate=0.3)], 0.5, 0.1)
    assert not (tmp_path / f"none.{suffix}").exists()


def test_names_in_the_picture(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    write_plot(tmp_path / "p.png", ROWS, 0.5, 0.1)
    figure = pyplot.gcf()
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["sfp", "ghfp", "dense"]  # the front
    assert len(right.lines) == 3 and [len(line.get_xdata()) for line in right.lines] == [7, 7, 7]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "ghfp",
        "sfp",
        "dense",
        "method",
        "scratch",
        "scratch-time",
        "literal",
        "Pareto front of the means",
    ]
    pyplot.close("all")
