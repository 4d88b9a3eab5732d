"""report RUN...: several runs in one page, whose plots answer in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from prunekernels import cli
from prunekernels.train import checkpoint
from prunekernels.train.compare import compare_runs
from prunekernels.train.config import Config

EPOCHS = 5
SUMMARY = {
    "accuracy": 0.91, "small_accuracy": 0.92, "parameters": 1000, "small_parameters": 400, "multiply_adds": 9000,
    "small_multiply_adds": 3000, "epoch_of": {"dense": 2.0, "this": 1.0, "small": 0.8},
}  # fmt: skip


def written(folder, epochs=EPOCHS, nan=False, **settings):
    """A run's folder, as far as a comparison reads it."""
    config = Config(str(folder), **{"epochs": EPOCHS, **settings}).as_dict()
    history = [
        {"loss": 1 / e, "train_accuracy": 0.1 * e, "accuracy": float("nan") if nan and e < epochs else 0.15 * e,
         "live": 1 - 0.1 * e, "seconds": 2.0 * e}
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    state = dict.fromkeys(checkpoint.KEYS) | {"config": config, "epoch": epochs, "history": history}
    folder.mkdir()
    checkpoint.save(folder / "checkpoint.pt", {**state, "states": [torch.zeros(2)] * epochs})
    (folder / "summary.json").write_text(json.dumps(SUMMARY))  # of an earlier run, where this one is not through
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        written(tmp_path / "dense"),
        written(tmp_path / "<b>$data", method="ghfp", options={"budget": {"flops": 0.4}}, nan=True),
        written(tmp_path / "part", epochs=3, method="ghfp", rate=0.3),
    ]


def test_the_page(runs, tmp_path):
    path = compare_runs(runs, tmp_path / "new" / "page.html")
    page = path.read_text()
    labels = ("dense", "ghfp at 0.4 of the multiply-adds", "ghfp at 0.3")
    assert all(f"<td>{label}</td>" in page for label in labels)
    assert "&lt;b&gt;$data" in page and "<b>$data" not in page
    assert (
        "<td>400 of 1,000</td><td>3,000 of 9,000</td><td>2.00</td>" in page and "<td>3 of 5</td><td>0.4500</td>" in page
    )
    assert "<td>rate</td><td>0.5</td><td>0.5</td><td>0.3</td>" in page and "<td>epochs</td>" not in page
    urls = set(re.findall(r"https?://[^\"']+", page))
    assert urls == {"http://www.w3.org/2000/svg"} and not re.search(r"\b(src|href)=", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [run["label"] for run in data["runs"]] == list(labels)
    assert data["runs"][1]["curves"]["accuracy"] == [None] * 4 + [0.75]
    assert data["runs"][2]["clock"] == [2.0, 6.0, 12.0]
    points = [run["point"] for run in data["runs"]]
    assert points == [{"x": 1 / 3, "y": 0.92}, {"x": 1 / 3, "y": 0.92}, None]


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, runs[:1]), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and "<h1>dense</h1>" in out.read_text()
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 2
    assert cli.main(["report", str(runs[0]), str(runs[0]), "--out", str(out)]) == 2
    assert "report: expected each run once" in capsys.readouterr().err


def test_runs_of_one_name_have_their_folders(tmp_path):
    same = [written(tmp_path / name, method="pgp", seed=seed) for seed, name in enumerate("ab")]
    page = compare_runs(same, tmp_path / "page.html").read_text()
    assert all(f"pgp at 0.5 ({html.escape(str(folder))})" in page for folder in same)


# ---- in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVE = """
<script>{
window.onerror = message => { document.title = "error: " + message; };
const found = {}, buttons = [...document.querySelectorAll("#bar button")];
const accuracy = document.querySelector("figure[data-plot^='accuracy, pruned']"), svg = accuracy.querySelector("svg");
const box = svg.getBoundingClientRect(), tip = accuracy.querySelector(".tip");
const paths = () => [...accuracy.querySelectorAll("path")].map(p => p.dataset.run).join("");
const send = (type, share) => svg.dispatchEvent(new PointerEvent(type,
  { clientX: box.left + share * box.width, clientY: box.top + box.height / 2, buttons: 1, bubbles: true }));
const texts = () => [...svg.querySelectorAll("text")].map(t => t.textContent);
const twice = b => ["click", "click", "dblclick"].forEach(type => b.dispatchEvent(new MouseEvent(type)));
found.plots = document.querySelectorAll("figure:not([hidden]) svg").length;
found.all = paths();
found.axis = texts().at(-1);
send("pointermove", 0.99); found.tip = tip.textContent; found.shown = !tip.hidden;
send("pointerleave", 0.5); found.gone = tip.hidden;
buttons[0].click(); found.without = paths(); found.pressed = buttons[0].getAttribute("aria-pressed");
buttons[0].click(); found.again = paths();
twice(buttons[2]); found.alone = paths();
twice(buttons[2]); found.back = paths();
send("pointerdown", 0.5); send("pointermove", 0.7); send("pointerup", 0.7); found.zoomed = texts();
svg.dispatchEvent(new MouseEvent("dblclick")); found.whole = texts();
const choice = document.querySelector("#bar select");
choice.value = "clock"; choice.dispatchEvent(new Event("change")); found.clock = texts().at(-1);
if (!document.title.startsWith("error")) document.title = JSON.stringify(found);
}</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_plots_answer(runs, tmp_path):
    page = compare_runs(runs, tmp_path / "page.html").read_text()
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</body>", DRIVE + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={tmp_path}/c"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", driven.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1])
    found = json.loads(title)
    assert found["plots"] == 6 and found["axis"] == "epoch" and found["clock"] == "seconds of training"
    assert (found["all"], found["without"], found["again"]) == ("012", "12", "012")
    assert found["pressed"] == "false" and (found["alone"], found["back"]) == ("2", "012")
    assert found["shown"] and found["gone"]
    assert "dense: 0.75 at 5" in found["tip"] and "ghfp at 0.3: 0.45 at 3" in found["tip"]
    assert found["zoomed"] != found["whole"] and "5" in found["whole"] and "5" not in found["zoomed"]
