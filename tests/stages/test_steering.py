"""Steering: the reward and the perplexity of what is said, by another way, and the main on a tiny model."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.prompts_of_stories import beginnings
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.rewards.sentiment import NEGATIVE, POSITIVE, sentiment_reward
from rlhf_jax.stages import dpo, grpo, steering
from rlhf_jax.stages.handoffs import load_model
from rlhf_jax.stages.run_directory import open_run
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

from .conftest import DPO, SFT, SHARED, StopAfter

STOP = StopRequest()
CONFIG = steering.Config(data=SFT.data, num_prompts=8, responses_per_prompt=2, batch_size=16, num_shown=2)


@pytest.fixture(scope="module")
def steered(ladder, tmp_path_factory):
    root = tmp_path_factory.mktemp("steered")
    config = grpo.Config(
        **(SHARED | {"batch_size": 64}) | {"schedule": Schedule(num_steps=30)},
        group_size=8,
        reward="sentiment",
        beta=0.0,
        num_eval_prompts=12,
    )
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"))
    grpo.run(config, root, init_from=ladder.sft, stop=STOP)
    return str(root)


def test_a_steered_policy_is_happier_further_away_and_stranger(ladder, steered, tmp_path):
    found = steering.run(CONFIG, tmp_path, first_from=ladder.sft, policies_from={"happy": steered}, stop=STOP)
    first, happy = found["first"], found["happy"]
    assert happy["sentiment"] > first["sentiment"] + 3 * first["sentiment_error"]
    assert abs(first["kl"]) < 1e-5 and happy["kl"] > 0.1
    assert json.loads((tmp_path / steering.SUMMARY).read_text()) == found
    shown = json.loads((tmp_path / steering.SAMPLES).read_text())
    assert len(shown["happy"]) == 2
    for row in shown["happy"]:
        assert row["sentiment"] == pytest.approx(float(sentiment_reward([row["response"]])[0]))


def test_the_standard_error_is_that_of_prompts_and_not_of_responses():
    """Two rounds of three prompts whose means are 1, 2 and 6: standard deviation sqrt(7), by sqrt(3)."""
    error = steering.standard_error([0.0, 2.0, 5.0, 2.0, 2.0, 7.0], rounds=2)
    assert error == pytest.approx((7 / 3) ** 0.5)
    assert steering.standard_error([1.0, 2.0], rounds=2) is None


def test_perplexity_is_the_first_models_of_what_the_policy_says(ladder, steered, tmp_path):
    """Against logits of the whole sequence, one row at a time, in float64."""
    run_ = open_run(tmp_path, "steering", CONFIG, inputs={}, parallelism="jit", mesh=None, stop=STOP)
    first, policy = load_model(ladder.sft, run_), load_model(steered, run_)
    said = []

    real = steering.rollouts.make_rollout
    steering_rollout = lambda *arguments: lambda *more: said.append(real(*arguments)(*more)) or said[-1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering.rollouts, "make_rollout", steering_rollout)
        nll = steering.make_nll(CONFIG, run_, first)
    encoded, _ = steering.batches.encode_prompts(
        steering.inputs.load_prompts(CONFIG.data).held_out[:5],
        first.tokenizer,
        prompt_length=CONFIG.data.prompt_length,
    )
    value = nll({"decoder": policy.params["decoder"]}, encoded, jax.random.key(3))
    (rollout,) = jax.device_get(said)
    params = jax.device_get({"decoder": first.params["decoder"]})
    hidden = decoder.hidden_states(
        first.config, params, jnp.asarray(rollout.tokens[:5]), jnp.asarray(rollout.token_mask[:5])
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(
        decoder.unembedding(first.config, params).T, np.float64
    )
    width, total, count = rollout.response_mask.shape[1], 0.0, 0
    start = rollout.tokens.shape[1] - width
    for row in range(5):
        for column in np.flatnonzero(rollout.response_mask[row]):
            scores = logits[row, start + column - 1]
            total += math.log(np.exp(scores - scores.max()).sum()) + scores.max()
            total -= scores[rollout.tokens[row, start + column]]
            count += 1
    assert value == pytest.approx(total / count, rel=1e-4)


def test_a_stop_keeps_nothing(ladder, tmp_path):
    with pytest.raises(Interrupted, match="keeps nothing half-done"):
        steering.run(CONFIG, tmp_path, first_from=ladder.sft, policies_from={}, stop=StopAfter(0))


def test_beginnings_of_stories_say_nothing_of_moods():
    texts = beginnings()
    assert len(set(texts)) == len(texts) == 96 and not any("{" in text for text in texts)
    words = {word.strip(".,").lower() for text in texts for word in text.split()}
    assert not words & (POSITIVE | NEGATIVE)


def test_pairs_are_the_happiest_with_the_least_happy():
    """By hand: of sentiments 2, 0, 1, 0, -1, 0 the pairs are 2 and -1, 1 and 0; 0 and 0 make none."""
    texts = [
        "happy good and so",
        "it is so",
        "happy it is so far away in the",
        "a house",
        "sad " * 9,
        "the end",
    ]
    scores = sentiment_reward(texts)
    assert (
        list(np.argsort(-scores, kind="stable")) == [0, 2, 1, 3, 5, 4] and scores[1] == scores[3] == scores[5]
    )
    assert steering.pairs_by_sentiment(texts) == [(texts[0], texts[4]), (texts[2], texts[5])]
    assert steering.pairs_by_sentiment(["", *texts, " "]) == steering.pairs_by_sentiment(texts)
    assert steering.pairs_by_sentiment(["a", "b"]) == [] == steering.pairs_by_sentiment(["", ""])


@pytest.mark.slow
def test_dpo_learns_from_pairs_of_the_first_models_own(ladder, tmp_path):
    config = steering.PairsConfig(data=SFT.data, responses_per_prompt=4, batch_size=32)
    path = steering.write_pairs(config, tmp_path / "pairs", first_from=ladder.sft, stop=STOP)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen, rejected = (sentiment_reward([row[name] for row in rows]) for name in ("chosen", "rejected"))
    assert (chosen > rejected).all() and len(rows) > 16
    prompts = {row.prompt for row in steering.inputs.load_prompts(SFT.data).train}
    assert {row["prompt"] for row in rows} <= prompts
    written = path.stat().st_mtime_ns
    assert steering.write_pairs(config, tmp_path / "pairs", first_from=ladder.sft, stop=STOP) == path
    assert path.stat().st_mtime_ns == written
    data = dataclasses.replace(SFT.data, path=str(path), truncation="keep_start")
    trained = dataclasses.replace(DPO, data=data, schedule=Schedule(num_steps=20))
    dpo.run(trained, tmp_path / "dpo", init_from=ladder.sft, stop=STOP)
    happy = {"happy": str(tmp_path / "dpo")}
    found = steering.run(CONFIG, tmp_path / "m", first_from=ladder.sft, policies_from=happy, stop=STOP)
    assert found["happy"]["sentiment"] > found["first"]["sentiment"] + 2 * found["first"]["sentiment_error"]


def test_pairs_that_cannot_be_are_refused(ladder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="responses_per_prompt is 3, which does not divide into pairs"):
        steering.PairsConfig(responses_per_prompt=3)
    with pytest.raises(Interrupted, match="pairs are kept once all are there"):
        steering.write_pairs(
            steering.PairsConfig(data=SFT.data), tmp_path / "a", first_from=ladder.sft, stop=StopAfter(0)
        )
    assert not (tmp_path / "a" / steering.PAIRS).exists()
    monkeypatch.setattr(steering, "sentiment_reward", lambda texts: np.zeros(len(texts)))
    config = steering.PairsConfig(data=SFT.data, responses_per_prompt=2)
    with pytest.raises(InputError, match="says nothing to any of 64 prompts that is happier"):
        steering.write_pairs(config, tmp_path / "b", first_from=ladder.sft, stop=STOP)
