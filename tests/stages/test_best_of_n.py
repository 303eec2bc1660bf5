"""Samples for best-of-n: which number belongs to which prompt, and that every proxy scores the same responses."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import policies
from rlhf_jax.rewards import ensembles
from rlhf_jax.stages import best_of_n, inputs, reward_model, rewards, rollouts
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.training.interrupt import Interrupted, StopRequest

from .conftest import DATA, REWARD, StopAfter

STOP = StopRequest()
CONFIG = best_of_n.Config(data=DATA, num_prompts=5, responses_per_prompt=8, batch_size=16)


def test_rows_are_prompts_columns_are_responses_and_proxies_share_them(ladder, tmp_path, monkeypatch):
    """Gold is replaced by the prompt's own number, and the length of the response is the second proxy's business."""
    prompts = [row.prompt for row in inputs.load_prompts(DATA).held_out[:5]]
    real = rewards.gold_reward(DATA, None)
    assert real is not None

    def gold(data, tokenizer):
        return policies.text_reward(
            tokenizer, lambda row, response, ended: prompts.index(row.prompt) + len(response) / 1000
        )

    monkeypatch.setattr(rewards, "gold_reward", gold)
    where = {"policy_from": ladder.sft, "rewards_from": {"a": ladder.reward_model, "b": ladder.reward_model}}
    found = best_of_n.run(CONFIG, tmp_path, stop=STOP, **where)
    assert set(found) == {"gold", "labeller", "log_prob", "a", "b"} and found["a"].shape == (5, 8)
    assert json.loads((tmp_path / "data.json").read_text())["prompts"]["kept"] == 5
    np.testing.assert_array_equal(np.floor(found["gold"]), np.repeat(np.arange(5.0)[:, None], 8, axis=1))
    np.testing.assert_array_equal(found["a"], found["b"])
    assert all(len(set(row)) > 1 for row in found["gold"]), "responses to a prompt differ"
    assert (found["log_prob"] < 0).all()
    # The second call reads what the first one left.
    monkeypatch.setattr(rollouts, "make_rollout", None)
    again = best_of_n.run(CONFIG, tmp_path, stop=STOP, **where)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    with pytest.raises(InputError, match="belongs to a run with another config"):
        best_of_n.run(
            dataclasses.replace(CONFIG, num_prompts=CONFIG.num_prompts - 1), tmp_path, stop=STOP, **where
        )


def test_the_labeller_is_gold_and_a_bias_and_an_ensemble_keeps_its_members(ladder, tmp_path):
    """Labellers believe gold (of a response that ended) and so much a word: only whole words may be between the two."""
    data = dataclasses.replace(DATA, world=dataclasses.replace(DATA.world, length_bias=0.5))
    config = dataclasses.replace(CONFIG, data=data)
    members = tmp_path / "members"
    reward_model.run(dataclasses.replace(REWARD, members=2), members, init_from=ladder.sft, stop=STOP)
    found = best_of_n.run(
        config, tmp_path / "n", policy_from=ladder.sft, rewards_from={"both": str(members)}, stop=STOP
    )
    assert found["both"].shape == (2, 5, 8)
    words = (found["labeller"] - found["gold"]) / 0.5
    # What never ended has another gold; what did has none to differ by but its words.
    whole = np.isclose(words, np.round(words), atol=1e-4)
    assert whole.mean() > 0.2 and len(set(np.round(words[whole]).astype(int))) > 3
    assert (words > 0).all()
    first = found["both"][0]
    alone = ensembles.member(load_handoff_model(members).params, 0)
    assert not np.allclose(first, found["both"][1]) and alone["head"]["kernel"].ndim == 1


def test_a_stop_keeps_nothing_half_done(ladder, tmp_path):
    where = {"policy_from": ladder.sft, "rewards_from": {"a": ladder.reward_model}}
    with pytest.raises(Interrupted, match="samples are kept once all are there"):
        best_of_n.run(CONFIG, tmp_path, stop=StopAfter(1), **where)
    assert not (tmp_path / best_of_n.SCORES).exists()


def test_what_has_no_gold_or_takes_its_name_is_refused(ladder, tmp_path):
    for name in ("gold", "labeller", "log_prob"):
        with pytest.raises(InputError, match=f"a proxy is called '{name}'"):
            best_of_n.run(
                CONFIG, tmp_path, policy_from=ladder.sft, rewards_from={name: ladder.reward_model}, stop=STOP
            )
    for changes in ({"path": "pairs.jsonl"}, {"embedded": "arithmetic"}):
        other = dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, **changes))
        where = {"policy_from": ladder.sft, "rewards_from": {"a": ladder.reward_model}}
        with pytest.raises(InputError, match="rows whose gold reward and labellers nobody knows"):
            best_of_n.run(other, tmp_path / "_".join(changes), stop=STOP, **where)
