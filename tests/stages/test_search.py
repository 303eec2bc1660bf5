"""Search with a process reward model: what is chosen among draws, and that the two ways differ in nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.stages import process_reward, rewards, search, sft
from rlhf_jax.training.interrupt import Interrupted, StopRequest

from .conftest import SFT, StopAfter
from .test_process_reward import CONFIG as PROCESS
from .test_process_reward import DATA

STOP = StopRequest()
CONFIG = search.Config(data=DATA, num_prompts=6, width=2, expansions=2, step_length=8, batch_size=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    sft.run(dataclasses.replace(SFT, data=DATA), root / "sft", stop=STOP)
    process_reward.run(PROCESS, root / "process", init_from=str(root / "sft"), stop=STOP)
    return {"policy_from": str(root / "sft"), "reward_from": str(root / "process")}


def test_a_judge_that_knows_the_answer_finds_what_there_is_to_find(runs, tmp_path, monkeypatch):
    """The verifier is replaced by "the response has an even number of characters", and the judge by the same.

    Best-of-n then finds an even one wherever there is one, and its share is that of ``any_right``.
    """
    judged = []

    def even(texts, answers):
        return np.array([len(text) % 2 == 0 for text in texts], np.float32)

    def process(model, scoring):
        def of_rows(rows, data_rows):
            # Ended or not, EOS is a token and no character.
            mask = np.asarray(rows.response_mask)
            said = np.asarray(rows.tokens)[:, -mask.shape[1] :]
            characters = (mask & (said != model.tokenizer.eos_token_id)).sum(axis=1)
            judged.append(mask.sum(axis=1))
            return (characters % 2 == 0).astype(np.float32)

        return rewards.Reward(of_rows=of_rows)

    monkeypatch.setattr(search.verifiers, "gsm8k_reward", even)
    monkeypatch.setattr(search.rewards, "process_reward", process)
    found = search.run(CONFIG, tmp_path, stop=STOP, **runs)
    assert set(found["best_of_n"]) == {1, 2, 4}
    assert found["best_of_n"] == pytest.approx(found["any_right"])
    assert 0.2 < found["best_of_n"][1] < 0.8 and found["best_of_n"][4] > found["best_of_n"][1] + 0.1
    assert found["step_beam"] > found["best_of_n"][1]
    # Beginnings are judged as well as ends, and nothing is longer than a response may be.
    lengths = np.concatenate(judged)
    assert len(set(lengths.tolist())) > 5 and lengths.max() <= DATA.response_length
    assert 4 <= found["tokens"]["best_of_n"] <= 4 * DATA.response_length
    assert json.loads((tmp_path / search.SUMMARY).read_text())["step_beam"] == found["step_beam"]


def test_steps_end_at_their_mark_and_the_same_seed_draws_the_same(runs, tmp_path):
    run_ = search.open_run(tmp_path, "search", CONFIG, inputs={}, parallelism="jit", mesh=None, stop=STOP)
    policy = search.load_model(runs["policy_from"], run_)
    judge = search.load_model(runs["reward_from"], run_)
    marks = search.step_marks(judge)
    assert [i for i, here in enumerate(marks) if here] == policy.tokenizer.convert_tokens_to_ids([";"])
    draw = search.make_draw(CONFIG, run_, policy, width=8, max_new_tokens=8, marks=marks)
    texts = [policy.tokenizer("3+4=")["input_ids"]] * 19
    first, again, other = draw(texts, 0), draw(texts, 0), draw(texts, 1)
    assert first == again and first != other and len(set(first)) > 5
    (mark,) = np.flatnonzero(marks).tolist()
    for said, ended in first:
        assert mark not in said[:-1] and ended == (said[-1] == policy.tokenizer.eos_token_id)
        assert len(said) == 8 or said[-1] == mark or ended


def test_what_cannot_work_is_refused_and_a_stop_keeps_nothing(runs, ladder, tmp_path):
    with pytest.raises(InputError, match="step_length is 99, and beside a prompt the context of .* lower it"):
        search.run(dataclasses.replace(CONFIG, step_length=99), tmp_path / "a", stop=STOP, **runs)
    with pytest.raises(InputError, match="is a reward model of responses; give a run of experiments.process"):
        where = {"policy_from": ladder.sft, "reward_from": ladder.reward_model}
        search.run(dataclasses.replace(CONFIG, data=SFT.data), tmp_path / "b", stop=STOP, **where)
    with pytest.raises(Interrupted, match="keeps nothing half-done"):
        search.run(CONFIG, tmp_path / "c", stop=StopAfter(1), **runs)
    assert not (tmp_path / "c" / search.SUMMARY).exists()
