"""Every example in a docstring of the losses runs and says what it prints; every public function has one."""

import doctest
import importlib
import pkgutil

import pytest

from rlhf_jax import losses, masking

MODULES = [masking] + [
    importlib.import_module(f"rlhf_jax.losses.{module.name}")
    for module in pkgutil.iter_modules(losses.__path__)
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", losses.__all__)
def test_every_loss_teaches(name):
    doc = getattr(losses, name).__doc__
    for part in (">>>", "Args:", "Returns:", "Raises:"):
        assert part in doc, f"{name} has no {part}"
