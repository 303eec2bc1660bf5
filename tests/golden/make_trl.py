"""Writes trl.json: what TRL's own functions return on fixed random input, and with which gradient.

Needs an environment of its own, since TRL is no dependency of the tests:

    python -m pip install torch==2.13.0 trl==1.16.0
    python tests/golden/make_trl.py

The trainers' loss methods are called on a stand-in for the trainer that holds their options, with a model that
returns the given log-probabilities; nothing of TRL's arithmetic is rewritten here.
"""

import collections
import json
import pathlib
import types
import unittest.mock

import numpy as np
import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd, selective_log_softmax_and_entropy

B, T, V = 4, 6, 7
RNG = np.random.default_rng(16)


def normal(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def log_probs(*shape):
    return -np.abs(normal(*shape)) - np.float32(0.05)


def masks(rows):
    lengths = RNG.integers(1, T + 1, size=rows)
    lengths[0] = T
    return np.arange(T)[None] < lengths[:, None]


class Accelerator:
    """One process: gathering and reducing give back what went in."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(**options):
    stand_in = unittest.mock.MagicMock()
    stand_in.accelerator = Accelerator()
    stand_in._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    stand_in._total_train_tokens, stand_in._tp_size, stand_in.aux_loss_enabled = 0, 1, False
    for name, value in options.items():
        setattr(stand_in, name, value)
    return stand_in


def with_gradient(loss, *leaves):
    loss.backward()
    return {"loss": loss.item(), "gradients": [leaf.grad.tolist() for leaf in leaves]}


def leaf(array):
    return torch.tensor(array, requires_grad=True)


def outputs(log_probs):
    filler = torch.zeros_like(log_probs)
    return types.SimpleNamespace(
        log_probs=log_probs, entropy=filler, mean_logits=filler, is_top1=filler.bool()
    )


def likelihood():
    logits, targets, weights = normal(2, 3, V), RNG.integers(0, V, size=(2, 3)), normal(2, 2, 3)
    z = leaf(logits)
    log_p, entropy = selective_log_softmax_and_entropy(z, torch.tensor(targets), temperature=0.7)
    total = (torch.tensor(weights[0]) * log_p + torch.tensor(weights[1]) * entropy).sum()
    return {
        "inputs": {"logits": logits, "targets": targets, "weights": weights, "temperature": 0.7},
        "log_probs": log_p.tolist(),
        "entropy": entropy.tolist(),
        **with_gradient(total, z),
    }


def direct(loss_type, **options):
    policy, ref, mask = log_probs(2 * B, T), log_probs(2 * B, T), masks(2 * B)
    policy, ref = (
        np.where(mask, policy, 0),
        np.where(mask, ref, 0),
    )  # TRL's head returns 0 outside the completion
    completion_mask = torch.tensor(np.concatenate([np.zeros((2 * B, 1), bool), mask], 1)).long()
    per_token = leaf(policy)
    this = trainer(
        beta=0.3, loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, precompute_ref_logps=True, **options,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long), "attention_mask": torch.ones(2 * B, T + 1),
        "completion_mask": completion_mask,
    }  # fmt: skip
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = torch.tensor(ref).sum(1).chunk(2)
    headed = per_token.masked_fill(
        torch.tensor(~mask), 0.0
    )  # as TRL's fused head leaves it outside the completion
    loss = DPOTrainer._compute_loss(this, lambda **_: outputs(headed), inputs, False)
    return {
        "inputs": {"policy": policy, "ref": ref, "mask": mask, "beta": 0.3, **options},
        **with_gradient(loss, per_token),
    }


def odds_ratio():
    chosen, rejected = log_probs(B), log_probs(B)
    leaves = leaf(chosen), leaf(rejected)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.2), *leaves)
    return {
        "inputs": {"chosen": chosen, "rejected": rejected, "weight": 0.2},
        "losses": losses.tolist(),
        **with_gradient(losses.sum(), *leaves),
    }


def simpo():
    chosen, rejected = log_probs(B), log_probs(B)
    leaves = leaf(chosen), leaf(rejected)
    this = trainer(beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0)
    losses, *_ = CPOTrainer.cpo_loss(this, *leaves)
    return {
        "inputs": {"chosen": chosen, "rejected": rejected, "beta": 2.0, "margin": 0.5},
        "losses": losses.tolist(),
        **with_gradient(losses.sum(), *leaves),
    }


def kto():
    policy, ref, kl, ref_kl = log_probs(B, T), log_probs(B, T), normal(B), normal(B)
    desirable = np.array([True, False, True, False])
    per_token = leaf(policy)
    this = trainer(
        beta=0.3, loss_type="kto", calculate_KL=True, precompute_ref_logps=True,
        desirable_weight=1.5, undesirable_weight=0.7,
    )  # fmt: skip
    this._compute_kl_logps = lambda model, batch: torch.tensor(kl)
    ones = torch.ones(B, T + 1, dtype=torch.long)
    inputs = {
        "label": torch.tensor(desirable), "input_ids": ones, "attention_mask": ones, "completion_mask": ones,
        "ref_logps": torch.tensor(ref).sum(1), "ref_KL_logps": torch.tensor(ref_kl),
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(this, lambda **_: outputs(per_token), inputs, False)
    return {
        "inputs": {"policy": policy, "ref": ref, "kl": kl, "ref_kl": ref_kl, "desirable": desirable, "beta": 0.3,
                   "desirable_weight": 1.5, "undesirable_weight": 0.7},
        **with_gradient(loss, per_token),
    }  # fmt: skip


def reward():
    rewards, margin = normal(2 * B), np.abs(normal(B))
    scores = leaf(rewards)
    this = trainer(args=types.SimpleNamespace(center_rewards_coefficient=0.01))
    model = lambda **_: types.SimpleNamespace(logits=scores[:, None])  # noqa: E731
    inputs = {"attention_mask": torch.ones(2 * B, T), "margin": torch.tensor(margin)}
    loss = RewardTrainer.compute_loss(this, model, inputs)
    return {
        "inputs": {"rewards": rewards, "margin": margin, "centering": 0.01},
        **with_gradient(loss, scores),
    }


def grpo(loss_type, level):
    policy, mask, advantages = log_probs(B, T), masks(B), normal(B)
    old, ref = policy + normal(B, T, scale=0.3), policy + normal(B, T, scale=0.3)
    per_token = leaf(policy)
    this = trainer(
        loss_type=loss_type, importance_sampling_level=level, beta=0.04, epsilon_low=0.2, epsilon_high=0.28,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=10,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )  # fmt: skip
    this._get_per_token_logps_and_entropies = lambda *_, **__: (per_token, torch.zeros(B, T), None)
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": torch.tensor(mask).long(), "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(old), "ref_per_token_logps": torch.tensor(ref),
        "num_items_in_batch": torch.tensor(mask.sum()),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(this, None, inputs)
    return {
        "inputs": {"policy": policy, "old": old, "ref": ref, "mask": mask, "advantages": advantages, "beta": 0.04,
                   "clip_low": 0.2, "clip_high": 0.28, "max_completion_length": 10},
        **with_gradient(loss, per_token),
    }  # fmt: skip


def rloo():
    policy, mask, advantages = log_probs(B, T), masks(B), normal(B)
    old = (np.where(mask, policy, 0).sum(1) + normal(B, scale=0.3)).astype(np.float32)
    per_token = leaf(policy)
    this = trainer(epsilon_low=0.2, epsilon_high=0.2)
    this._get_per_token_logps_and_entropies = lambda *_, **__: (per_token, torch.zeros(B, T), None)
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": torch.tensor(mask).long(), "advantages": torch.tensor(advantages),
        "old_logps": torch.tensor(old),
    }  # fmt: skip
    loss = RLOOTrainer._compute_loss(this, None, inputs)
    return {
        "inputs": {"policy": policy, "old_sums": old, "mask": mask, "advantages": advantages, "clip": 0.2},
        **with_gradient(loss, per_token),
    }


def group_spread():
    """The one piece of GRPO's advantage that is a function of its own: the standard deviation of a group."""
    rewards = np.stack([np.array([1.0, 2.0, 3.0], np.float32), normal(3)])
    return {"inputs": {"rewards": rewards}, "std": nanstd(torch.tensor(rewards), dim=1).tolist()}


def main():
    golden = {"trl": trl.__version__, "torch": torch.__version__, "likelihood": likelihood()}
    for name, options in [
        ("sigmoid", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("sigmoid_norm", {}),
        ("robust", {"label_smoothing": 0.1}),
    ]:
        golden[f"dpo/{name}"] = direct(name, **options)
    golden |= {"orpo": odds_ratio(), "simpo": simpo(), "kto": kto(), "reward": reward(), "rloo": rloo()}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        golden[f"grpo/{loss_type}"] = grpo(loss_type, "token")
    golden["gspo"] = grpo("grpo", "sequence")
    golden["group_spread"] = group_spread()
    path = pathlib.Path(__file__).parent / "trl.json"
    path.write_text(json.dumps(golden, default=lambda array: array.tolist(), indent=None) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
