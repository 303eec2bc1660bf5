"""A functional RLHF research framework for JAX: pure losses, Flax models, one train step, Orbax from stage to stage.

Importing the package imports nothing else; take what you need, e.g. ``from rlhf_jax import losses``.
"""

__version__ = "0.1.0"
