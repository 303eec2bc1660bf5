"""Importing the losses is light: jax and what it needs, none of the heavy rooms of the house."""

import subprocess
import sys

HEAVY = (
    "transformers",
    "tensorflow_datasets",
    "tensorflow",
    "grain",
    "orbax",
    "flax",
    "optax",
    "torch",
    "absl.flags",
)


def test_importing_losses_pulls_in_none_of_the_heavy_packages():
    script = f"import sys, rlhf_jax.losses; print(sorted(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_names_are_flat_and_complete():
    """Every public function of a module is re-exported, and nothing else is."""
    import importlib
    import pkgutil

    from rlhf_jax import losses

    public = set()
    for module in pkgutil.iter_modules(losses.__path__):
        if module.name != "checks":
            loaded = importlib.import_module(f"rlhf_jax.losses.{module.name}")
            public |= {name for name in loaded.__all__ if callable(getattr(loaded, name))}
    assert public == set(losses.__all__)
    assert losses.__all__ == sorted(losses.__all__)
