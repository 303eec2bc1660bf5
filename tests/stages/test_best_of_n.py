"""Samples for best-of-n: which number belongs to which prompt, and that every proxy scores the same responses."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import policies
from rlhf_jax.stages import best_of_n, inputs, rollouts
from rlhf_jax.training.interrupt import Interrupted, StopRequest

from .conftest import DATA, StopAfter

STOP = StopRequest()
CONFIG = best_of_n.Config(data=DATA, num_prompts=5, responses_per_prompt=8, batch_size=16)


def test_rows_are_prompts_columns_are_responses_and_proxies_share_them(ladder, tmp_path, monkeypatch):
    """Gold is replaced by the prompt's own number, and the length of the response is the second proxy's business."""
    prompts = [row.prompt for row in inputs.load_prompts(DATA).held_out[:5]]
    real = rollouts.gold_reward(DATA, None)
    assert real is not None

    def gold(data, tokenizer):
        return policies.text_reward(
            tokenizer, lambda row, response, ended: prompts.index(row.prompt) + len(response) / 1000
        )

    monkeypatch.setattr(rollouts, "gold_reward", gold)
    where = {"policy_from": ladder.sft, "rewards_from": {"a": ladder.reward_model, "b": ladder.reward_model}}
    found = best_of_n.run(CONFIG, tmp_path, stop=STOP, **where)
    assert set(found) == {"gold", "a", "b"} and found["a"].shape == (5, 8)
    np.testing.assert_array_equal(np.floor(found["gold"]), np.repeat(np.arange(5.0)[:, None], 8, axis=1))
    np.testing.assert_array_equal(found["a"], found["b"])
    assert all(len(set(row)) > 1 for row in found["gold"]), "responses to a prompt differ"
    # The second call reads what the first one left.
    monkeypatch.setattr(rollouts, "make_rollout", None)
    again = best_of_n.run(CONFIG, tmp_path, stop=STOP, **where)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_a_stop_keeps_nothing_half_done(ladder, tmp_path):
    where = {"policy_from": ladder.sft, "rewards_from": {"a": ladder.reward_model}}
    with pytest.raises(Interrupted, match="samples are kept once all are there"):
        best_of_n.run(CONFIG, tmp_path, stop=StopAfter(1), **where)
    assert not (tmp_path / best_of_n.SCORES).exists()


def test_what_has_no_gold_or_takes_its_name_is_refused(ladder, tmp_path):
    with pytest.raises(InputError, match="a proxy is called 'gold'"):
        best_of_n.run(
            CONFIG, tmp_path, policy_from=ladder.sft, rewards_from={"gold": ladder.reward_model}, stop=STOP
        )
    files = dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, path="pairs.jsonl"))
    with pytest.raises(InputError, match="rows whose gold reward nobody knows"):
        best_of_n.run(
            files, tmp_path, policy_from=ladder.sft, rewards_from={"a": ladder.reward_model}, stop=STOP
        )
