"""Our losses against TRL's own functions (trl.json, written by make_trl.py): values and gradients.

Where TRL computes something else by default, the composition that turns ours into theirs is what is tested.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking

GOLDEN = json.loads((pathlib.Path(__file__).parent / "trl.json").read_text())


def inputs_of(name):
    """The recorded inputs, numbers as they are and lists as arrays of their first dtype (float32, int32 or bool)."""
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    arrays = {k: np.array(v) for k, v in GOLDEN[name]["inputs"].items() if isinstance(v, list)}
    numbers = {k: v for k, v in GOLDEN[name]["inputs"].items() if not isinstance(v, list)}
    return {k: v.astype(narrow.get(v.dtype, v.dtype)) for k, v in arrays.items()} | numbers


def assert_theirs(name, function, *leaves):
    """``function(*leaves)`` and its gradients are the recorded loss and gradients."""
    loss, gradients = jax.value_and_grad(function, tuple(range(len(leaves))))(*map(jnp.asarray, leaves))
    assert float(loss) == pytest.approx(GOLDEN[name]["loss"], rel=1e-5)
    for ours, theirs in zip(gradients, GOLDEN[name]["gradients"], strict=True):
        np.testing.assert_allclose(ours, np.array(theirs), rtol=2e-5, atol=1e-6)


def test_the_version_is_written_down():
    assert GOLDEN["trl"] == "1.16.0"


def test_token_log_probs_and_entropy():
    given = inputs_of("likelihood")
    options = {"temperature": given["temperature"]}
    ours = losses.token_log_probs(given["logits"], given["targets"], **options)
    np.testing.assert_allclose(ours, GOLDEN["likelihood"]["log_probs"], rtol=1e-5)
    entropy = losses.token_entropy(given["logits"], **options)
    np.testing.assert_allclose(entropy, GOLDEN["likelihood"]["entropy"], rtol=1e-5)

    def total(logits):
        log_p = losses.token_log_probs(logits, given["targets"], **options)
        weighted = given["weights"][0] * log_p + given["weights"][1] * losses.token_entropy(logits, **options)
        return weighted.sum()

    assert_theirs("likelihood", total, given["logits"])


def pairs(given, log_probs, reduce):
    policy, ref = (reduce(x, given["mask"]) for x in (log_probs, given["ref"]))
    return *jnp.split(policy, 2), *jnp.split(ref, 2)


DIRECT = {
    "sigmoid": (losses.dpo_loss, losses.sequence_log_probs, {}),
    "hinge": (losses.hinge_loss, losses.sequence_log_probs, {}),
    "robust": (losses.robust_dpo_loss, losses.sequence_log_probs, {"label_smoothing": 0.1}),
    "ipo": (losses.ipo_loss, losses.sequence_mean_log_probs, {}),  # TRL compares means, the paper sums
    "sigmoid_norm": (losses.dpo_loss, losses.sequence_mean_log_probs, {}),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_preference_losses(name):
    loss, reduce, options = DIRECT[name]
    given = inputs_of(f"dpo/{name}")

    def total(policy):
        return loss(*pairs(given, policy, reduce), beta=given["beta"], **options).mean()

    assert_theirs(f"dpo/{name}", total, given["policy"])


def test_ipo_with_sums_is_another_number():
    """The switch matters: on the same input, sums give another loss than the means that TRL takes."""
    given = inputs_of("dpo/ipo")
    sums = pairs(given, given["policy"], losses.sequence_log_probs)
    assert abs(float(losses.ipo_loss(*sums, beta=0.3).mean()) - GOLDEN["dpo/ipo"]["loss"]) > 0.1


def test_trl_ignores_label_smoothing_in_dpo_and_we_do_not():
    """`label_smoothing` is read by TRL's "robust" only; with it, ours is the conservative DPO of Mitchell (2023)."""
    given = inputs_of("dpo/sigmoid")
    four = pairs(given, given["policy"], losses.sequence_log_probs)
    smoothed = losses.dpo_loss(*four, beta=0.3, label_smoothing=0.1).mean()
    assert abs(float(smoothed) - GOLDEN["dpo/sigmoid"]["loss"]) > 0.01


def test_orpo():
    """TRL returns weight * log sigmoid and subtracts it from the supervised loss: ours has the minus inside."""
    given = inputs_of("orpo")
    ours = losses.orpo_loss(given["chosen"], given["rejected"], weight=given["weight"])
    np.testing.assert_allclose(-ours, GOLDEN["orpo"]["losses"], rtol=1e-5)
    assert_theirs(
        "orpo",
        lambda c, r: -losses.orpo_loss(c, r, weight=given["weight"]).sum(),
        given["chosen"],
        given["rejected"],
    )


def test_simpo():
    given = inputs_of("simpo")
    options = {"beta": given["beta"], "margin": given["margin"]}
    ours = losses.simpo_loss(given["chosen"], given["rejected"], **options)
    np.testing.assert_allclose(ours, GOLDEN["simpo"]["losses"], rtol=1e-5)
    assert_theirs(
        "simpo", lambda c, r: losses.simpo_loss(c, r, **options).sum(), given["chosen"], given["rejected"]
    )


def test_kto():
    """TRL's baseline is the mean log-ratio of mismatched pairs, clamped at 0: the clamp is within ours."""
    given = inputs_of("kto")
    options = {key: given[key] for key in ("beta", "desirable_weight", "undesirable_weight")}
    baseline = jnp.mean(given["kl"] - given["ref_kl"])

    def total(policy):
        four = policy.sum(1), given["ref"].sum(1), given["desirable"], baseline
        return losses.kto_loss(*four, **options).mean()

    assert_theirs("kto", total, given["policy"])


def test_reward_model():
    given = inputs_of("reward")

    def total(rewards):
        chosen, rejected = jnp.split(rewards, 2)
        options = {"margin": given["margin"], "centering": given["centering"]}
        return losses.bradley_terry_loss(chosen, rejected, **options).mean()

    assert_theirs("reward", total, given["rewards"])


REDUCTIONS = {
    "grpo": masking.sequence_mean_of_token_means,
    "bnpo": masking.token_mean,
    "dapo": masking.token_mean,
    "dr_grpo": lambda x, mask: masking.fixed_length_mean(x, mask, length=10),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_grpo_family(name):
    """Four TRL loss types are one token loss under four reductions; k3 is added to the loss, not to the reward."""
    given = inputs_of(f"grpo/{name}")
    advantages = np.broadcast_to(given["advantages"][:, None], given["policy"].shape)

    def total(policy):
        surrogate = losses.clipped_surrogate_loss(
            policy, given["old"], advantages, clip_low=0.2, clip_high=0.28
        )
        token_losses = surrogate + given["beta"] * losses.kl_k3(policy, given["ref"])
        return REDUCTIONS[name](token_losses, given["mask"]).mean()

    assert_theirs(f"grpo/{name}", total, given["policy"])


@pytest.mark.parametrize("per_token", [False, True], ids=["one advantage a response", "one a token"])
def test_gspo(per_token):
    given = inputs_of("gspo")
    advantages = given["advantages"]
    if per_token:
        advantages = np.broadcast_to(advantages[:, None], given["policy"].shape)

    def total(policy):
        surrogate = losses.sequence_clipped_surrogate_loss(
            policy, given["old"], advantages, given["mask"], clip_low=0.2, clip_high=0.28
        )
        kl = given["beta"] * losses.kl_k3(policy, given["ref"])
        if per_token:
            return masking.sequence_mean_of_token_means(surrogate + kl, given["mask"]).mean()
        return surrogate.mean() + masking.sequence_mean_of_token_means(kl, given["mask"]).mean()

    assert_theirs("gspo", total, given["policy"])


def test_rloo():
    """TRL clips the ratio of whole responses, not its geometric mean: one "token" a response."""
    given = inputs_of("rloo")

    def total(policy):
        whole = losses.sequence_log_probs(policy, given["mask"])[:, None]
        old, advantages = given["old_sums"][:, None], given["advantages"][:, None]
        return losses.clipped_surrogate_loss(whole, old, advantages, clip_low=0.2, clip_high=0.2).mean()

    assert_theirs("rloo", total, given["policy"])


def test_group_spread():
    """TRL's standard deviation has n - 1; with its epsilon that makes +-0.99990 of [1, 2, 3]."""
    rewards, spread = inputs_of("group_spread")["rewards"], np.array(GOLDEN["group_spread"]["std"])
    theirs = (rewards - rewards.mean(1, keepdims=True)) / (spread[:, None] + 1e-4)
    ours = losses.group_relative_advantages(rewards)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[0], [-0.99990, 0.0, 0.99990], atol=1e-5)
