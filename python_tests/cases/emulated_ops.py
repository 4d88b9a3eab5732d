"""What the tests of the emulated CUDA operators share: putting them in the place of prunekernels' own; their log."""

import pytest

import prunekernels as pk
from cases.emulated import build

if not pk.has_extension():
    pytest.skip("the compiled extension is not there, so nothing makes tables", allow_module_level=True)


@pytest.fixture(scope="module")
def library():
    from cases.emulated import operators

    try:
        return operators.load()[1]
    except build.Broken as why:
        pytest.fail(str(why), pytrace=False)


@pytest.fixture
def events(library, monkeypatch):
    """Lets prunekernels compute with the emulated operators. Returns what they did since it was last called."""
    from cases.emulated import operators

    for replacement in operators.replacements():
        monkeypatch.setattr(*replacement)
    operators.register_gradients()

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
