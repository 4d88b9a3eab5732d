import pytest

import prunekernels as pk


@pytest.fixture(autouse=True)
def _model_decides():
    """Plans by the cost model: the same in both modes."""
    with pk.plan.measure(False):
        yield
