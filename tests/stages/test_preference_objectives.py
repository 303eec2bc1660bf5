"""Every loss on pairs as a stage: what it is at the start by hand, that it learns, and KTO's baseline by a loop."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches, world
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import dpo
from rlhf_jax.stages import preference_objectives as objectives
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch

from .conftest import DATA, DPO, WORLD

STOP = StopRequest()


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def start(ladder):
    """(model, params, a batch of eight pairs) of the tiny ladder."""
    model = ModelConfig.from_dict(checkpoints.load_handoff(ladder.sft)[0].model)
    encoded, _ = batches.encode_preferences(
        world.preferences(WORLD, "train"), world.world_tokenizer(), **DATA.widths
    )
    batch, _ = next(iter(batches.eval_batches(encoded, 8)))
    return model, params_of(ladder.sft), jax.tree.map(jnp.asarray, batch)


# The policy is the reference: every log-ratio is 0.
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (PreferenceLoss(), math.log(2)),
        (PreferenceLoss(label_smoothing=0.2), math.log(2)),
        (PreferenceLoss(kind="robust", label_smoothing=0.2), math.log(2)),
        (PreferenceLoss(kind="ipo", beta=0.25), 4.0),
        (PreferenceLoss(kind="hinge"), 1.0),
        (PreferenceLoss(kind="kto"), 0.5),
    ],
    ids=lambda x: x.kind if isinstance(x, PreferenceLoss) else None,
)
def test_at_the_reference_a_loss_is_what_it_is_at_zero(loss, value, start):
    model, params, batch = start
    frozen = {"reference": params}
    if loss.kind == "kto":
        batch = objectives.make_unpair(model, loss)(params, frozen, batch)
        terms, _ = objectives.make_unpaired_objective(model, loss)(params, frozen, batch)
    else:
        terms, _ = objectives.make_pair_objective(model, loss)(params, frozen, batch)
    (term,) = terms.values()
    assert float(term.mean()) == pytest.approx(value, rel=1e-5)


def means_of(model, params, batch, temperature=1.0):
    log_probs, _ = response_log_probs(model, params, batch, temperature=temperature)
    rows = zip(np.asarray(log_probs, np.float64), np.asarray(batch.response_mask), strict=True)
    return np.array([row[mask].mean() for row, mask in rows])


def test_the_losses_without_reference_against_loops(start):
    model, params, batch = start
    chosen, rejected = (means_of(model, params, side) for side in (batch.chosen, batch.rejected))
    gap = 2.0 * (chosen - rejected) - 0.5
    terms, metrics = objectives.make_pair_objective(
        model, PreferenceLoss(kind="simpo", beta=2.0, margin=0.5)
    )(params, {}, batch)
    assert float(terms["simpo"].mean()) == pytest.approx(np.mean(np.log1p(np.exp(-gap))), rel=1e-5)
    assert float(metrics["margin"].mean()) == pytest.approx(np.mean(2.0 * (chosen - rejected)), abs=1e-5)
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
    terms, _ = objectives.make_pair_objective(model, PreferenceLoss(kind="orpo", beta=0.3))(params, {}, batch)
    ratio = np.mean(0.3 * np.log1p(odds[1] / odds[0]))
    assert float(terms["orpo"].mean()) == pytest.approx(ratio, rel=1e-4)
    lengths = np.asarray(batch.chosen.response_mask).sum(axis=1)
    assert float(terms["likelihood"].mean()) == pytest.approx(
        -(chosen * lengths).sum() / lengths.sum(), rel=1e-5
    )


def test_kto_compares_with_responses_to_other_prompts(start):
    """The baseline against a loop that joins each prompt with the next row's response, one row at a time."""
    model, params, batch = start
    other = jax.tree.map(lambda x: 1.3 * x, params)
    unpaired = objectives.make_unpair(model, PreferenceLoss(kind="kto"))(other, {"reference": params}, batch)
    assert np.asarray(unpaired.desirable).tolist() == [True] * 8 + [False] * 8
    rows = [(side, i) for side in (batch.chosen, batch.rejected) for i in range(8)]
    ratios = []
    width = batch.chosen.response_mask.shape[1]
    for (side, i), (next_side, j) in zip(rows, rows[1:] + rows[:1], strict=True):
        joined = DemonstrationBatch(
            tokens=jnp.concatenate([side.tokens[i, :-width], next_side.tokens[j, -width:]])[None],
            token_mask=jnp.concatenate([side.token_mask[i, :-width], next_side.token_mask[j, -width:]])[None],
            response_mask=next_side.response_mask[j][None],
        )
        ratios.append(
            float(
                (
                    response_log_probs(model, other, joined)[0] - response_log_probs(model, params, joined)[0]
                ).sum()
            )
        )
    np.testing.assert_allclose(unpaired.kl_baseline, np.mean(ratios), rtol=1e-4)


def test_a_tie_teaches_nothing(start):
    """Pairs marked as ties change neither value nor gradient: those of the other pairs alone."""
    model, params, batch = start
    objective = objectives.make_pair_objective(model, PreferenceLoss(beta=1.0))
    other = jax.tree.map(lambda x: 1.3 * x, params)
    loss = lambda p, b: objective(p, {"reference": params}, b)[0]["dpo"].mean()  # noqa: E731
    tied = jnp.arange(8) % 2 == 0

    def mark(side):
        return dataclasses.replace(side, response_mask=side.response_mask & ~tied[:, None])

    marked = PreferenceBatch(chosen=mark(batch.chosen), rejected=mark(batch.rejected))
    rest = jax.tree.map(lambda x: x[1::2], batch)
    (value, gradient), (expected, expected_gradient) = (
        jax.value_and_grad(loss)(other, pairs) for pairs in (marked, rest)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    far = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), gradient, expected_gradient
    )
    # Log-ratios are differences of sums of hundreds of nats, which float32 keeps to some 1e-5.
    assert max(jax.tree.leaves(far)) < 3e-5, far


LOSSES = [
    PreferenceLoss(kind="ipo", beta=0.5),
    PreferenceLoss(kind="robust", beta=1.0, label_smoothing=0.1),
    PreferenceLoss(kind="hinge", beta=1.0),
    PreferenceLoss(kind="simpo", beta=2.0, margin=0.5),
    PreferenceLoss(kind="orpo", beta=0.5),
    PreferenceLoss(kind="kto", beta=1.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_every_loss_learns_to_tell_the_training_pairs_apart(loss, ladder, tmp_path):
    config = dataclasses.replace(DPO, schedule=Schedule(num_steps=25), loss=loss)
    dpo.run(config, tmp_path, init_from=ladder.sft, stop=STOP)
    rows = rows_of(tmp_path)[1:]
    apart = lambda row: row["reward_chosen"] - row["reward_rejected"]  # noqa: E731
    assert np.mean([apart(row) for row in rows[-4:]]) > apart(rows[0]) + 0.1


def test_kto_does_not_depend_on_the_split(ladder, tmp_path):
    """Its baseline is of the whole batch, whatever the micro-batches and devices."""
    found = {}
    for arguments in (("jit", 1), ("jit", 2), ("pmap", 1)):
        config = dataclasses.replace(
            DPO,
            schedule=Schedule(num_steps=3),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
            loss=PreferenceLoss(kind="kto"),
            num_microbatches=arguments[1],
        )
        where = tmp_path / f"{arguments}"
        dpo.run(config, where, init_from=ladder.sft, stop=STOP, parallelism=arguments[0])
        found[arguments] = params_of(where)
    for arguments in (("jit", 2), ("pmap", 1)):
        far = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), found["jit", 1], found[arguments]
        )
        assert max(jax.tree.leaves(far)) < 1e-5, far


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"kind": "robust"}, "label_smoothing is 0, for which kind=robust is kind=dpo; give the rate"),
        (
            {"kind": "ipo", "label_smoothing": 0.1},
            "label_smoothing is 0.1, which kind=ipo does not read; leave",
        ),
        ({"margin": 1.0}, "margin is 1.0, which kind=dpo does not read; leave it at 0.0, or use kind=simpo"),
        ({"desirable_weight": 2.0}, "desirable_weight is 2.0, which kind=dpo does not read"),
    ],
)
def test_numbers_that_the_loss_cannot_use_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        PreferenceLoss(**fields)
