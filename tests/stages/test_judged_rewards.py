"""A judge as what stages optimise: nothing is learned of what it gave no verdict on, and the run says how often."""

import dataclasses
import json
import math
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data.rows import Prompt
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import decoder
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import judges
from rlhf_jax.stages import grpo, judged_rewards, online_dpo, ppo, rejection, rollouts
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.judged_rewards import JudgeOptions
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.types import Rollout

from .conftest import DATA, PPO, SHARED

STOP = StopRequest()
BATCH = SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=2), "num_eval_prompts": 12}
STAGES = {
    "grpo": (grpo, grpo.Config(**BATCH, group_size=4, reward="judge")),
    "batch baseline": (grpo, grpo.Config(**BATCH, baseline="batch", beta=0.0, reward="judge")),
    "online_dpo": (online_dpo, online_dpo.Config(**BATCH, reward="judge")),
    "best": (rejection, rejection.Config(**BATCH, group_size=4, reward="judge")),
    "distribution": (rejection, rejection.Config(**BATCH, kind="distribution", reward="judge")),
    "ppo": (ppo, dataclasses.replace(PPO, reward="judge", schedule=Schedule(num_steps=2))),
}
JUDGE = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    scores = [float(len(text)) for text in asked["responses"]]
    print(json.dumps({"scores": scores if not MUTE(asked["prompt"]) else []}), flush=True)
"""


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


def judge_of(tmp_path, mute: str) -> JudgeOptions:
    path = tmp_path / "judge.py"
    path.write_text(f"MUTE = lambda prompt: {mute}\n{JUDGE}")
    return JudgeOptions(command=shlex.join([sys.executable, "-I", "-S", str(path)]), failures=10_000)


@pytest.mark.parametrize("stage", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_run_asks_its_judge_and_counts_what_it_did_not_answer(stage, ladder, tmp_path):
    module, config = STAGES[stage]
    config = dataclasses.replace(config, judge=judge_of(tmp_path, "sum(map(ord, prompt)) % 2"))
    module.run(config, tmp_path / "run", init_from=ladder.sft, stop=STOP)
    rows = rows_of(tmp_path / "run")
    for row in rows[1:]:
        assert 0 < row["no_verdict"] < 1
        groups = config.batch_size // getattr(config, "group_size", 1)
        assert row["no_verdict_wrong_count"] == pytest.approx(row["no_verdict"] * groups)
        assert row["no_verdict_late"] == row["no_verdict_died"] == 0
        # The mean of what was judged: no response of the world is shorter than a letter or longer than a page.
        assert 10 < row["proxy"] < 400
        assert np.isfinite(row["loss"]) and row.get("skipped_updates", 0) == 0
    assert 0 < rows[0]["eval/no_verdict"] < 1 and rows[0]["eval/proxy"] > 10


CHEAP = ("grpo", "best")


@pytest.mark.parametrize(
    "stage", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]
)
def test_nothing_is_learned_without_a_verdict(stage, ladder, tmp_path):
    """Policy parameters keep their bits (of PPO the value model too: there are no returns to learn)."""
    module, config = STAGES[stage]
    config = dataclasses.replace(config, judge=judge_of(tmp_path, "True"))
    module.run(config, tmp_path / "run", init_from=ladder.sft, stop=STOP)
    start, end = (
        checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(path)))
        for path in (ladder.sft, tmp_path / "run")
    )
    jax.tree.map(np.testing.assert_array_equal, start["decoder"], end["decoder"])
    row = rows_of(tmp_path / "run")[-1]
    assert row["no_verdict"] == 1.0 and row["proxy"] == row["kl"] == 0.0


def rollout_of(rows):
    return Rollout(
        tokens=jnp.zeros((rows, 3), jnp.int32),
        token_mask=jnp.ones((rows, 3), bool),
        response_mask=jnp.ones((rows, 2), bool),
        log_probs=jnp.full((rows, 2), -1.0),
        terminated=jnp.zeros(rows, bool),
        policy_step=jnp.int32(0),
    )


def test_a_group_without_a_verdict_has_no_spread_whatever_its_ends_are_scored():
    """Dynamic sampling draws others in its place; the first two prompts have no verdict and one unfinished row each."""
    verdicts = [False, False, True, True]

    def rollout(params, prompts, key, step):
        found = rollout_of(len(prompts["index"]))
        ended = jnp.arange(len(prompts["index"])) % 2 == 0
        return dataclasses.replace(found, terminated=ended, tokens=found.tokens + prompts["index"][:, None])

    def reward(rollout, index):
        has_verdict = np.array([verdicts[i] for i in index])
        scores = np.where(has_verdict, np.arange(len(index)), 0).astype(np.float32)
        reasons = {name: 0 for name in judges.REASONS} | {"late": int((~has_verdict).sum()) // 2}
        return judges.Judged(scores=scores, has_verdict=has_verdict, reasons=reasons)

    collect = rollouts.make_collect(rollout, reward, group_size=2, rounds=2, missing_eos_score=-9.0)
    prompts = {
        "tokens": np.zeros((4, 1), np.int32),
        "token_mask": np.ones((4, 1), bool),
        "index": np.arange(4),
    }
    scored, index, metrics = collect(None, prompts, jax.random.key(0), 0)
    assert index.tolist() == [2, 2, 3, 3]
    assert scored.rollout.response_mask.all() and (scored.rollout.log_probs == -1.0).all()
    assert float(metrics["no_verdict"].mean()) == 0.5 and float(metrics["no_verdict_late"].value) == 2
    scored, _, _ = rollouts.make_collect(rollout, reward, group_size=2)(
        None, {name: x[:3] for name, x in prompts.items()}, jax.random.key(0), 0
    )
    assert scored.rollout.response_mask[:, 0].tolist() == [False] * 4 + [True] * 2
    assert scored.rollout.log_probs[:, 0].tolist() == [0.0] * 4 + [-1.0] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "config.reward is 'judge', which needs config.judge.command"),
        (
            {"reward": "model", "judge": JudgeOptions(command="x")},
            "config.judge.* is given, which .*=model does not",
        ),
        (
            {"judge": JudgeOptions(command="x"), "answer_weight": 1.0},
            "answer_weight is 1.0, which cannot be added",
        ),
    ],
)
def test_a_judge_that_nothing_asks_is_refused(change, message, ladder, tmp_path):
    config = dataclasses.replace(STAGES["grpo"][1], **change)
    with pytest.raises(InputError, match=message):
        grpo.run(config, tmp_path, init_from=ladder.sft, stop=STOP)


def test_a_judge_that_never_answers_ends_the_run(ladder, tmp_path):
    judge = dataclasses.replace(judge_of(tmp_path, "True"), failures=5)
    config = dataclasses.replace(STAGES["grpo"][1], judge=judge)
    with pytest.raises(
        InputError, match=r"gave no verdict 5 times in a row; .* it gave 0 scores for 1 responses"
    ):
        grpo.run(config, tmp_path / "run", init_from=ladder.sft, stop=STOP)


# A judge of the embedded world's words, of which it has learned nothing; what it says is checked, not how wise it is.
WORDS = JudgeOptions(
    principle="the cast was bold",
    template="{prompt} {first} . {principle} . {second} . ",
    choices=("bold", "dull"),
)


def test_what_beats_the_others_of_its_group_by_asking_the_model_itself(ladder, tmp_path):
    run = Run(workdir=tmp_path, stage="grpo", mesh=meshes.data_mesh(), parallelism="jit", stop=STOP)
    judge = load_handoff_model(ladder.sft, run.mesh)
    tokenizer = judge.tokenizer
    texts = ["the cast was bold", "really really", "awful .", "awful .", "the plot", "loved it ."]
    rows = [Prompt(prompt=prompt, source="a") for prompt in ("a film", "a book") for _ in range(3)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    tokens = np.full((6, 2 + width), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((6, width), bool)
    for row, said in enumerate(ids):
        tokens[row, 2 : 2 + len(said)], mask[row, : len(said)] = said, True
    rollout = dataclasses.replace(rollout_of(6), tokens=jnp.asarray(tokens), response_mask=jnp.asarray(mask))
    ask = judged_rewards.ask_model(judge, WORDS, tokenizer, run, batch_size=8, group_size=3)
    found = ask(rollout, rows)

    def margin(prompt, first, second):
        question = WORDS.template.format(prompt=prompt, principle=WORDS.principle, first=first, second=second)
        asked = jnp.asarray([[tokenizer.bos_token_id, *tokenizer(question)["input_ids"]]])
        logits = decoder.logits(judge.config, judge.params, asked, jnp.ones(asked.shape, bool))[0, -1]
        good, bad = (tokenizer.convert_tokens_to_ids(word) for word in WORDS.choices)
        return float(logits[good] - logits[bad])

    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = []
    for i in range(6):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        wins = [
            (
                sigmoid(margin(rows[i].prompt, texts[i], texts[j]))
                + sigmoid(-margin(rows[i].prompt, texts[j], texts[i]))
            )
            / 2
            for j in group
            if j != i
        ]
        expected.append(np.mean(wins))
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert found.has_verdict.all() and np.ptp(found.scores) > 1e-4
    short = dataclasses.replace(judge, config=dataclasses.replace(judge.config, max_length=15))
    cut = judged_rewards.ask_model(short, WORDS, tokenizer, run, batch_size=8, group_size=3)(rollout, rows)
    assert cut.has_verdict.tolist() == [False] * 3 + [True] * 3 and cut.reasons["too_long"] == 1
    np.testing.assert_allclose(cut.scores, [0.0] * 3 + expected[3:], atol=1e-5)


@pytest.mark.slow
def test_a_run_on_ai_feedback_and_its_win_rate_over_the_first_policy(ladder, tmp_path):
    # Two responses, and the question around them, in the context that was made for one.
    config = dataclasses.replace(
        STAGES["grpo"][1], judge=WORDS, data=dataclasses.replace(DATA, response_length=12)
    )
    where = {"init_from": ladder.sft, "judge_from": ladder.sft}
    grpo.run(config, tmp_path, stop=STOP, **where)
    rows = rows_of(tmp_path)
    assert [row["proxy"] for row in rows[1:]] == pytest.approx([0.5, 0.5], abs=1e-6), (
        "what one wins another loses"
    )
    assert rows[1]["group_std"] > 0 and rows[1]["no_verdict"] == 0
    # Other samples of the same policy.
    assert rows[0]["eval/proxy"] == pytest.approx(0.5, abs=0.05) and rows[0]["eval/no_verdict"] == 0


def test_what_a_language_model_cannot_judge_by_is_refused(ladder, tmp_path):
    where = {"init_from": ladder.sft, "judge_from": ladder.sft, "stop": STOP}
    base = STAGES["grpo"][1]
    for changes, message in (
        (
            {"judge": JudgeOptions()},
            "choices has 'A', which is not one token of .*sft after config.judge.template",
        ),
        ({"judge": dataclasses.replace(WORDS, command="x")}, "and not both; give one"),
        (
            {"judge": dataclasses.replace(WORDS, seconds=1.0)},
            "judge.seconds is given, which a language model",
        ),
        (
            {"judge": WORDS, "group_size": 1, "baseline": "batch"},
            "compares the responses to a prompt, and this stage",
        ),
    ):
        with pytest.raises(InputError, match=message):
            grpo.run(dataclasses.replace(base, **changes), tmp_path, **where)
    for options, message in (
        ({"choices": ("A", "A")}, "choices is .*; give two different words"),
        ({"template": "{prompt} {first}"}, "must have {first} and {second}, each of them once"),
        ({"template": "{first} {second}"}, "each of them once, and {prompt}"),
        ({"template": "{prompt} {first} {second}", "principle": "be kind"}, "no {principle} that would show"),
        ({"template": "{answer} {first} {second}"}, r"cannot be filled in \(KeyError\('answer'\)\)"),
    ):
        with pytest.raises(InputError, match=message):
            JudgeOptions(**options)


def test_only_the_first_process_asks_and_the_others_get_its_answer(ladder, monkeypatch):
    """As the second of two processes, whose judge would not even start; what arrives has been through JSON."""
    tokenizer = load_handoff_model(ladder.sft).tokenizer
    sent = {"scores": [1.5, 0.0], "has_verdict": [True, False], "reasons": {"late": 1}}
    monkeypatch.setattr(hosts, "decided_by_main", lambda decide: json.loads(json.dumps(sent)))
    judge = judges.CommandJudge("/no/such/judge", seconds=1.0, failures=1)
    ask = judged_rewards.ask_command(judge, tokenizer, group_size=1)
    rows = [Prompt(prompt=prompt, source="a") for prompt in ("p", "q")]
    found = ask(rollout_of(2), rows)
    assert found.scores.dtype == np.float32 and found.scores.tolist() == [1.5, 0.0]
    assert found.has_verdict.tolist() == [True, False] and found.reasons == {"late": 1}
    np.testing.assert_array_equal(judged_rewards.or_nan(ask)(rollout_of(2), rows), [1.5, np.nan])
    monkeypatch.undo()
    with pytest.raises(InputError, match="cannot be started"):
        ask(rollout_of(2), rows)
