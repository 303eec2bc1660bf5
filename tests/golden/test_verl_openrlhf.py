"""Our losses against verl's and OpenRLHF's own functions (written by make_verl_openrlhf.py): values and gradients.

Where they compute something else, the composition that turns ours into theirs is what is tested.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking

HERE = pathlib.Path(__file__).parent
VERL, OPENRLHF = (json.loads((HERE / f"{name}.json").read_text()) for name in ("verl", "openrlhf"))


def inputs_of(record):
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    arrays = {name: np.array(value) for name, value in record["inputs"].items()}
    return {name: a.astype(narrow.get(a.dtype, a.dtype)) for name, a in arrays.items()}


def assert_theirs(record, function, *leaves):
    loss, gradients = jax.value_and_grad(function, tuple(range(len(leaves))))(*map(jnp.asarray, leaves))
    assert float(loss) == pytest.approx(record["loss"], rel=1e-5)
    for ours, theirs in zip(gradients, record["gradients"], strict=True):
        np.testing.assert_allclose(ours, np.array(theirs), rtol=2e-5, atol=1e-6)


def test_the_versions_are_written_down():
    assert VERL["version"] == "0.9.1" and OPENRLHF["version"] == "0.11.2"


REDUCTIONS = {
    "token-mean": masking.token_mean,
    "seq-mean-token-sum": masking.sequence_mean_of_token_sums,
    "seq-mean-token-mean": masking.sequence_mean_of_token_means,
    "seq-mean-token-sum-norm": lambda x, mask: masking.fixed_length_mean(x, mask, length=6),
}


def surrogate(policy, given):
    return losses.clipped_surrogate_loss(
        policy, given["old"], given["advantages"], clip_low=0.2, clip_high=0.28
    )


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_verl_policy_loss(mode):
    """The input holds a log-ratio of 31, which both cut at 20."""
    record = VERL[f"policy/{mode}"]
    given = inputs_of(record)
    assert_theirs(
        record, lambda p: REDUCTIONS[mode](surrogate(p, given), given["mask"]).mean(), given["policy"]
    )


def test_verl_dual_clip_is_one_more_minimum():
    record = VERL["policy/dual-clip"]
    given = inputs_of(record)
    advantages = given["advantages"]

    def total(policy):
        single = surrogate(policy, given)
        dual = jnp.where(advantages < 0, jnp.minimum(single, -3.0 * advantages), single)
        return masking.token_mean(dual, given["mask"]).mean()

    assert_theirs(record, total, given["policy"])


@pytest.mark.parametrize("record", [VERL["value"], OPENRLHF["value"]], ids=["verl", "OpenRLHF"])
def test_value_loss(record):
    """Their default clip is 0.5 and ours 0.2; the factor of one half is everyone's."""
    given = inputs_of(record)

    def total(values):
        unreduced = losses.clipped_value_loss(values, given["old_values"], given["returns"], clip=0.5)
        return masking.token_mean(unreduced, given["mask"]).mean()

    assert_theirs(record, total, given["values"])


ESTIMATORS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_verl_kl(name):
    """Same within bounds; verl cuts k3's log-ratio at -20 too and its value at 10, with gradient 0 beyond."""
    record = VERL[f"kl/{name}"]
    given = inputs_of(record)
    ours = np.asarray(ESTIMATORS[name](given["policy"], given["ref"]))
    theirs = np.array(record["values"])
    np.testing.assert_allclose(np.minimum(ours, 10.0) if name == "k3" else ours, theirs, rtol=1e-5, atol=1e-6)
    if name == "k3":
        assert ours[0, 0] == pytest.approx(29.0) and theirs[0, 0] == 10.0  # log-ratio -30: exact, and cut
        assert ours[1, 1] == pytest.approx(np.exp(20.0), rel=1e-5) and theirs[1, 1] == 10.0
    else:
        assert_theirs(record, lambda p: ESTIMATORS[name](p, given["ref"]).sum(), given["policy"])


def test_verl_straight_through_k3():
    """Their "k3+" has the value of k3 and the gradient of k2: two of ours and a stop_gradient."""
    record = VERL["kl/k3+"]
    given = inputs_of(record)
    kept = np.abs(given["policy"] - given["ref"]) < 20

    def total(policy):
        k2, k3 = (estimator(policy, given["ref"]) for estimator in (losses.kl_k2, losses.kl_k3))
        return jnp.sum(k2 - jax.lax.stop_gradient(k2) + jax.lax.stop_gradient(jnp.minimum(k3, 10.0)))

    assert float(total(given["policy"])) == pytest.approx(record["loss"], rel=1e-5)
    gradient = jax.grad(total)(given["policy"])
    np.testing.assert_allclose(gradient[kept], np.array(record["gradients"][0])[kept], rtol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_openrlhf_kl(name):
    """They cut every estimator at +-10 in value."""
    given = inputs_of(OPENRLHF[f"kl/{name}"])
    ours = jnp.clip(ESTIMATORS[name](given["policy"], given["ref"]), -10.0, 10.0)
    np.testing.assert_allclose(ours, OPENRLHF[f"kl/{name}"]["values"], rtol=1e-5, atol=1e-6)


def test_verl_gae_with_a_hole():
    """Interior masked tokens are skipped alike; verl whitens inside, with n - 1."""
    record = VERL["gae"]
    given = inputs_of(record)
    mask = given["mask"]
    advantages, returns = losses.generalized_advantage_estimation(
        given["rewards"], given["values"], mask, gamma=0.9, lam=0.8
    )
    for ours, theirs in [(advantages, record["advantages"]), (returns, record["returns"])]:
        np.testing.assert_allclose(np.asarray(ours)[mask], np.array(theirs)[mask], rtol=1e-5, atol=1e-6)
    n = mask.sum()
    whitened = masking.masked_whiten(advantages, mask) * np.sqrt((n - 1) / n, dtype=np.float32)
    np.testing.assert_allclose(
        np.asarray(whitened)[mask], np.array(record["whitened"])[mask], rtol=1e-5, atol=1e-6
    )


def test_openrlhf_gae():
    given = inputs_of(OPENRLHF["gae"])
    mask = given["mask"]
    advantages, returns = losses.generalized_advantage_estimation(**given, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(
        np.asarray(advantages)[mask], np.array(OPENRLHF["gae"]["advantages"])[mask], rtol=1e-5
    )
    np.testing.assert_allclose(
        np.asarray(returns)[mask], np.array(OPENRLHF["gae"]["returns"])[mask], rtol=1e-5
    )


def test_openrlhf_penalized_rewards():
    """The score on the last unmasked token, hole or not; only the hole itself, which no loss reads, differs."""
    given = inputs_of(OPENRLHF["penalized"])
    ours = np.asarray(losses.kl_penalized_rewards(given["scores"], given["kl"], given["mask"], beta=0.2))
    theirs = np.array(OPENRLHF["penalized"]["values"])
    np.testing.assert_allclose(ours[given["mask"]], theirs[given["mask"]], rtol=1e-5)


def test_verl_groups():
    """Their epsilon is 1e-6; a group of one keeps its raw reward, where ours gives 0."""
    rewards = inputs_of(VERL["groups"])["rewards"]
    theirs = {name: np.array(VERL["groups"][name]) for name in ("grpo", "rloo", "dr_grpo")}
    for rows in (slice(0, 3), slice(4, 8)):
        group = rewards[None, rows]
        ours = {
            "grpo": losses.group_relative_advantages(group, epsilon=1e-6),
            "dr_grpo": losses.group_relative_advantages(group, scale=False),
            "rloo": losses.leave_one_out_advantages(group),
        }
        for name, advantages in ours.items():
            np.testing.assert_allclose(advantages[0], theirs[name][rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs["grpo"][:3], [-0.999999, 0.0, 0.999999], atol=1e-6)
    assert theirs["rloo"][3] == rewards[3] == 2.0
    assert float(losses.leave_one_out_advantages(rewards[3].reshape(1, 1))[0, 0]) == 0.0


def test_verl_whitening_has_n_minus_one():
    given = inputs_of(VERL["whiten"])
    n = given["mask"].sum()
    ours = masking.masked_whiten(given["x"], given["mask"]) * np.sqrt((n - 1) / n, dtype=np.float32)
    theirs = np.array(VERL["whiten"]["values"])
    np.testing.assert_allclose(np.asarray(ours)[given["mask"]], theirs[given["mask"]], rtol=1e-5, atol=1e-6)


DIRECT = {
    "dpo": (losses.dpo_loss, {}),
    "cdpo": (losses.dpo_loss, {"label_smoothing": 0.1}),
    "ipo": (losses.ipo_loss, {}),
}


@pytest.mark.parametrize("name", DIRECT)
def test_openrlhf_direct_preference_losses(name):
    """Sums over tokens go in, for IPO too: no switch needed."""
    loss, options = DIRECT[name]
    given = inputs_of(OPENRLHF[name])
    refs = given["ref_chosen"], given["ref_rejected"]
    assert_theirs(
        OPENRLHF[name],
        lambda chosen, rejected: loss(chosen, rejected, *refs, beta=0.3, **options).mean(),
        given["policy_chosen"],
        given["policy_rejected"],
    )


@pytest.mark.parametrize(
    "name, reduction",
    [("token", masking.token_mean), ("sample", masking.sequence_mean_of_token_means)],
)
def test_openrlhf_policy_loss(name, reduction):
    record = OPENRLHF[f"policy/{name}"]
    given = inputs_of(record)
    assert_theirs(record, lambda p: reduction(surrogate(p, given), given["mask"]).mean(), given["policy"])


def test_openrlhf_gspo():
    """One ratio a response, an advantage a token: the same value as ours. (Gradients differ: theirs passes the whole
    sequence's advantages through the shared ratio, ours is GSPO-token.)"""
    record = OPENRLHF["policy/gspo"]
    given = inputs_of(record)
    unreduced = losses.sequence_clipped_surrogate_loss(
        given["policy"], given["old"], given["advantages"], given["mask"], clip_low=0.2, clip_high=0.28
    )
    ours = masking.sequence_mean_of_token_means(unreduced, given["mask"]).mean()
    assert float(ours) == pytest.approx(record["loss"], rel=1e-5)


def test_openrlhf_reward_model():
    record = OPENRLHF["reward"]
    given = inputs_of(record)
    assert_theirs(
        record,
        lambda chosen, rejected: losses.bradley_terry_loss(chosen, rejected, margin=given["margin"]).mean(),
        given["chosen"],
        given["rejected"],
    )


def test_openrlhf_token_log_probs():
    given = inputs_of(OPENRLHF["likelihood"])
    ours = losses.token_log_probs(given["logits"], given["targets"], temperature=0.7)
    np.testing.assert_allclose(ours, OPENRLHF["likelihood"]["log_probs"], rtol=1e-5, atol=1e-6)
