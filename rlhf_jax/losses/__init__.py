"""Every loss as a pure function of arrays; imports jax and `rlhf_jax.masking`, and nothing else of the
library.

Losses come back unreduced, in float32 (float64 stays float64 where x64 is enabled); reduce them once, with
`rlhf_jax.masking`. The differentiated argument comes first. What an objective holds constant gets no
gradient.
"""

from rlhf_jax.losses.advantages import (
    generalized_advantage_estimation,
    group_relative_advantages,
    leave_one_out_advantages,
)
from rlhf_jax.losses.kl import (
    adaptive_beta,
    full_forward_kl,
    full_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_penalized_rewards,
)
from rlhf_jax.losses.likelihood import (
    chunked_token_log_probs,
    sequence_log_probs,
    sequence_mean_log_probs,
    token_entropy,
    token_log_probs,
)
from rlhf_jax.losses.policy import (
    advantage_weighted_loss,
    clipped_surrogate_loss,
    distribution_matching_loss,
    reinforce_loss,
    reward_weighted_loss,
    sequence_clipped_surrogate_loss,
)
from rlhf_jax.losses.preference import (
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_jax.losses.process import process_reward_loss
from rlhf_jax.losses.reward_modelling import (
    bradley_terry_loss,
    length_moments,
    length_penalty_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from rlhf_jax.losses.value import clipped_value_loss, value_loss

__all__ = [
    "adaptive_beta",
    "advantage_weighted_loss",
    "bradley_terry_loss",
    "chunked_token_log_probs",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "distribution_matching_loss",
    "dpo_loss",
    "full_forward_kl",
    "full_kl",
    "generalized_advantage_estimation",
    "group_relative_advantages",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalized_rewards",
    "kto_loss",
    "leave_one_out_advantages",
    "length_moments",
    "length_penalty_loss",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "process_reward_loss",
    "reinforce_loss",
    "reward_weighted_loss",
    "robust_dpo_loss",
    "sequence_clipped_surrogate_loss",
    "sequence_log_probs",
    "sequence_mean_log_probs",
    "simpo_loss",
    "token_entropy",
    "token_log_probs",
    "value_loss",
]
