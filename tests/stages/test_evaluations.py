"""Runs that end because an evaluation is no longer the best: on a script, in a stage, and across interruptions."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import evaluations, grpo, ppo
from rlhf_jax.stages.evaluations import StopWhen
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule

from .conftest import DATA, PPO, SHARED, StopAfter

STOP = StopRequest()
CONFIG = grpo.Config(
    **(SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=8, eval_every=1, save_every=3)}),
    group_size=4,
    beta=0.0,
    num_eval_prompts=12,
    stop_when=StopWhen(patience=2),
)


def after(script, patience):
    """(what ended each evaluation, the best) of a run whose measure follows a script; parameters count the steps."""
    best, ended = evaluations.nothing_yet({"w": jnp.float32(0)}), []
    for step, value in enumerate(script):
        found, params = {"eval/gold": value, "eval/kl": 1.0}, {"w": jnp.float32(step)}
        best, ends = evaluations.after(StopWhen(patience=patience), best, params, found, jnp.int32(step))
        ended.append(ends)
    return ended, best


@pytest.mark.parametrize(
    ("script", "ends_at", "best"),
    [
        ([1.0, 3.0, 2.0, 2.5, 2.9], 4, 1),
        (
            [1.0, 3.0, np.nan, 2.0, 4.0, 3.0, 3.0, 4.0],
            7,
            4,
        ),  # neither a NaN nor as good as the best is better
        ([5.0, 1.0, 2.0, 3.0], 3, 0),  # the initial policy was the best
        ([np.nan, 1.0, 2.0, 3.0, 4.0], None, 4),
        ([-np.inf, 1.0, 0.0, 0.0], None, 1),
    ],
)
def test_patience_on_a_script(script, ends_at, best):
    ended, found = after(script, patience=3)
    assert ended == [step == ends_at for step in range(len(script))]
    assert evaluations.facts_of(found) == {"best_iteration": best, "best_value": script[best]}
    assert float(evaluations.left({"w": -1.0}, found)["w"]) == best


def test_without_patience_nothing_is_kept():
    best, ends = evaluations.after(StopWhen(kl_above=0.5), None, {"w": 7}, {"eval/kl": 1.0}, jnp.int32(3))
    assert ends and best is None
    assert evaluations.left({"w": 7}, best) == {"w": 7} and evaluations.facts_of(best) == {}


def decoder_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))["decoder"]


@pytest.mark.slow
def test_a_run_leaves_its_best_policy_whoever_interrupts_it(ladder, tmp_path):
    """A schedule that ends at the best evaluation leaves the same bits: nothing but the end depends on what follows."""
    where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
    run = functools.partial(grpo.run, CONFIG, held_out_reward_from=ladder.reward_model, **where)
    run(tmp_path / "whole", stop=STOP)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tmp_path / "halves", stop=StopAfter(1))
    run(tmp_path / "halves", stop=STOP)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "halves")]
    assert texts[0] == texts[1]
    rows = list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    gold = np.array([np.float32(row["eval/gold"]) for row in rows])
    best = int(np.argmax(gold))
    first = next((n for n in range(len(gold)) if n - np.argmax(gold[: n + 1]) >= 2), 8)
    assert rows[-1]["step"] == first, "two evaluations after the best so far, or at the schedule's end"
    handoff, _ = checkpoints.load_handoff(tmp_path / "whole")
    assert handoff.facts == {"best_iteration": best, "best_value": float(gold[best])}
    assert all(row["eval/held_out"] == pytest.approx(row["eval/proxy"]) for row in rows), "they are one model"
    expected = ladder.sft
    if best:
        expected = tmp_path / "short"
        schedule = dataclasses.replace(CONFIG.schedule, num_steps=best)
        short = dataclasses.replace(CONFIG, schedule=schedule, stop_when=StopWhen())
        grpo.run(short, expected, stop=STOP, **where)
    for name in ("whole", "halves"):
        jax.tree.map(np.testing.assert_array_equal, decoder_of(tmp_path / name), decoder_of(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schedule": Schedule(num_steps=8)},
            "patience is 2 evaluations, and config.schedule.eval_every is 0",
        ),
        (
            {"data": dataclasses.replace(DATA, path="a.jsonl")},
            "'gold', which nobody knows of a.jsonl; give 'held_out'",
        ),
        ({"stop_when": StopWhen(patience=1, measure="held_out")}, "needs --held_out_reward_from=<run of"),
    ],
)
def test_a_patience_that_waits_for_nothing_is_refused(change, message):
    config = dataclasses.replace(CONFIG, **change)
    gold = None if config.data.path else lambda rollout, rows: None
    with pytest.raises(InputError, match=message):
        evaluations.check_stop_when(config, gold=gold, held_out=None)


def test_a_measure_without_patience_is_refused():
    with pytest.raises(InputError, match="measure is 'held_out', which nothing reads without patience"):
        StopWhen(measure="held_out")


@pytest.mark.slow
def test_ppo_keeps_the_best_policy_and_no_value_model_beside_it(ladder, tmp_path):
    """At a learning rate of 0 no evaluation is better than the first, and what is left is the initial policy."""
    frozen = dataclasses.replace(PPO.optimizer, learning_rate=0.0)
    schedule = Schedule(num_steps=4, eval_every=1, save_every=1)
    config = dataclasses.replace(PPO, optimizer=frozen, schedule=schedule, stop_when=StopWhen(patience=2))
    ppo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    handoff, _ = checkpoints.load_handoff(tmp_path)
    assert handoff.facts["best_iteration"] == 0
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 2
    jax.tree.map(np.testing.assert_array_equal, decoder_of(tmp_path), decoder_of(ladder.sft))
    kept = ppo.make_method(None, None, config).kept({"policy": 1, "value": 2})
    assert kept == {"policy": 1}
