"""pytest -p cases.emulated.operators_plugin: the tests run on the device implementation, emulated."""

from . import operators

operators.use()
