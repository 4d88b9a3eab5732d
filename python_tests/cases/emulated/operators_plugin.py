"""pytest -p emulated.ring_plugin: the tests chosen run on the torch ring of csrc/cuda, under the emulator."""

from . import ring

ring.use()
