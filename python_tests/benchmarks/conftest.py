import pytest

from layers import options


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    """Unless a test gives conv.py --compile-seconds: it takes seconds indeed."""
    monkeypatch.setattr(options, "COMPILE_SECONDS", 0.0)
