"""Folders of saved networks that are damaged, foreign or made to do harm."""

import json
import shutil

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.deploy import round_trip
from cases.hostile import FOREIGN, Marker, damaged, in_little_memory
from prunekernels.deploy.tensor_file import read_tensors

hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.hostile
FILES = ("config.json", "model.safetensors")
X = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and what its network computes."""
    folder = tmp_path_factory.mktemp("saved") / "net"
    torch.manual_seed(0)
    loaded = round_trip(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ELU(0.5)), folder, X)
    return folder, loaded(X)


def refused(folder, name, content):
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError) as error:
        pk.load_small(folder)
    assert str(error.value).startswith(f"load_small: {folder / name}: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return str(error.value)


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("name", FILES)
def test_foreign_file(tmp_path, saved, name, content):
    folder = shutil.copytree(saved[0], tmp_path / "net")
    assert "expected" in refused(folder, name, FOREIGN[content])


@pytest.mark.parametrize("name", (*FILES, "model.pt2"))
def test_a_pickle_is_not_unpickled(tmp_path, saved, name):
    folder, marker = shutil.copytree(saved[0], tmp_path / "net"), tmp_path / "marker"
    torch.save(Marker(marker), folder / name)
    if name == "model.pt2":
        assert torch.equal(pk.load_small(folder)(X), saved[1])  # not read
    else:
        refused(folder, name, (folder / name).read_bytes())
    assert not marker.exists()


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_files_are_not_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_bytes(FOREIGN[content])
    with pytest.raises(FileExistsError, match="expected one without config.json, or overwrite=True"):
        pk.save_small(nn.Conv2d(3, 4, 1), tmp_path, X, formats=["safetensors"])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("config.json", FOREIGN[content])]


@pytest.mark.parametrize("name", FILES)
def test_damaged_file(tmp_path, saved, name):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    folder = shutil.copytree(saved[0], tmp_path / "net")
    whole = (folder / name).read_bytes()

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.data())
    def check(data):
        (folder / name).write_bytes(damaged(whole, data))
        try:
            loaded = pk.load_small(folder)
        except ValueError as error:
            assert str(error).startswith(f"load_small: {folder}")
        else:
            assert torch.equal(loaded(X), saved[1])

    check()


def test_every_byte_of_the_tensors_counts(tmp_path, saved):
    path = shutil.copytree(saved[0], tmp_path / "net") / "model.safetensors"
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="the file is damaged"):
            read_tensors(path)


@pytest.mark.parametrize(("old", "new"), [("0.5", "0.75"), ("true", "false")])
def test_a_changed_description(tmp_path, saved, old, new):
    folder = shutil.copytree(saved[0], tmp_path / "net")
    text = (folder / "config.json").read_text()
    assert old in text
    refused(folder, "config.json", text.replace(old, new, 1).encode())


def test_files_without_checksums(tmp_path, saved):
    """Of other tools, and of this package before it wrote them."""
    folder = shutil.copytree(saved[0], tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    del config["checksum"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(pk.load_small(folder)(X), saved[1])


@pytest.mark.parametrize("shape", [[10**2000, 10**2000, 10**2000], [2**62] * 65, [2**63]])
def test_sizes_beyond_torch(tmp_path, saved, shape):
    folder = shutil.copytree(saved[0], tmp_path / "net")
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    assert "expected dtype, shape and data_offsets" in refused(folder, "model.safetensors", content)


LARGE = """
LIMIT
import json, pathlib
import prunekernels as pk
folder = pathlib.Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def attempt():
    try:
        pk.load_small(folder)
        print("loaded")
    except ValueError as error:
        print(error)

text = (folder / "config.json").read_text()
for old in ('"in_channels": 3', '"num_features": 4'):
    assert old in text
    (folder / "config.json").write_text(text.replace(old, f"{old}000000000000"))
    attempt()
(folder / "config.json").write_text(text)
size = 1 << 40
header = json.dumps({"0.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
with open(folder / "model.safetensors", "wb") as file:  # the file is as long as it says, and takes no place on the disk
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + size)
attempt()
with open(folder / "config.json", "wb") as file:
    file.truncate(1 << 40)
attempt()
"""


def test_huge_sizes_in_little_memory(tmp_path, saved):
    folder = shutil.copytree(saved[0], tmp_path / "net")
    *said, peak = in_little_memory(LARGE, folder)
    assert [text.split(": ")[1].rsplit("/")[-1] for text in said] == [
        "config.json", "config.json", "model.safetensors", "config.json"]  # fmt: skip
    assert "expected what fits into memory" in said[2] and "expected at most" in said[3] and int(peak) < 100
