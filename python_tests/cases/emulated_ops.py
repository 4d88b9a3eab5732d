"""What the tests of the torch ring of csrc/cuda share: the ring in the place of prunekernels' operators, its log."""

import pytest

import prunekernels as pk
from cases.emulated import build

if not pk.has_extension():
    pytest.skip("the compiled extension is not there, so nothing makes tables", allow_module_level=True)


@pytest.fixture(scope="module")
def library():
    from cases.emulated import operators as ring

    try:
        return ring.load()[1]
    except build.Broken as why:
        pytest.fail(str(why), pytrace=False)


@pytest.fixture
def events(library, monkeypatch):
    """Lets prunekernels compute with the ring; a function that tells what it did since the last call."""
    from cases.emulated import operators as ring

    for replacement in ring.replacements():
        monkeypatch.setattr(*replacement)
    ring.register_gradients()

    def take():
        return library.pk_take_events().decode().split()

    take()
    yield take
    library.pk_pretend_to_capture(False)


def launched(events):
    return [event for event in events() if event not in ("upload", "download")]


def copies(events):
    return [event for event in events() if event in ("upload", "download")]


PACK, UNPACK, JOIN = "launch_pack_weights", "launch_unpack_grad_weight", "launch_join"
GATHER, SCATTER = "launch_gather_channels", "launch_scatter_channels"
