"""Optax chains and schedules from one small config. Imports errors only."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import optax

from rlhf_jax.errors import InputError, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and global-norm clipping.

    learning_rate: the highest one, after warm-up. weight_decay: decoupled (AdamW). b1, b2: decay of Adam's moments.
    epsilon: 1e-5, what the RLHF papers used (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO").
    max_grad_norm: gradients are scaled down to this global L2 norm; 0 leaves them alone.
    schedule: after ``warmup_steps`` of linear rise, constant, or down to 0 at the last step, linearly or as a cosine.
    """

    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-5
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", at_least=0)
        check_range(self, "b1", "b2", at_least=0, below=1)
        check_range(self, "epsilon", above=0)


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """The learning rate at each of ``num_updates`` optimiser updates."""
    decay_steps = max(num_updates - config.warmup_steps, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, 0.0, decay_steps)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    else:
        raise InputError(f"optimizer.schedule is {config.schedule!r}; use 'constant', 'linear' or 'cosine'")
    if not config.warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """The Optax chain; weight decay spares vectors (norm scales, biases), as is usual for decoders."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adam = optax.adamw(
        learning_rate_schedule(config, num_updates),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params),
    )
    return optax.chain(clip, adam)


def _is_matrix(path: tuple, leaf: jax.Array) -> bool:
    # Below "layers" axis 0 is the layer: the norm scales of all layers are [L, D], and vectors still.
    stacked = any(getattr(key, "key", None) == "layers" for key in path)
    return leaf.ndim - stacked >= 2
