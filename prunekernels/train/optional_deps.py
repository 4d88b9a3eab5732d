"""Packages that only training needs: imported where they are used, with an error that says how to install them."""

from __future__ import annotations

import importlib
from typing import Any

# Import name -> (what pip calls it, the extra of this package that brings it).
EXTRAS = {
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "cli"),
    "PIL": ("Pillow", "cli"),
    "yaml": ("PyYAML", "cli"),
    "tensorboard": ("tensorboard", "log"),
    "wandb": ("wandb", "log"),
    "mlflow": ("mlflow", "log"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
}


def need(module: str, why: str) -> Any:
    """Imports a module of EXTRAS.

    Args:
        module: Its import name.
        why: What needs it, for the error that says what to install.
    """
    package, extra = EXTRAS[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{why}: expected {package}: pip install "prunekernels[{extra}]"; got: {error}') from error
