"""Process rewards as stages: which tokens end steps, what is measured of them, and GRPO that gives credit by steps."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import arithmetic, batches
from rlhf_jax.data.arithmetic import ArithmeticConfig
from rlhf_jax.data.rows import ProcessSteps, Prompt
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import decoder, heads
from rlhf_jax.stages import grpo, inputs, ppo, process_reward, rewards, sft
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.rewards import Scoring
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import Rollout, ScoredRollout

from .conftest import SFT, SHARED, StopAfter

STOP = StopRequest()
DATA = DataConfig(
    embedded="arithmetic",
    arithmetic=ArithmeticConfig(num_digits=1, num_demonstrations=256, num_prompts=64, num_eval_prompts=24),
    prompt_length=8,
    response_length=18,
    truncation="keep_start",  # a step said twice is too long
)
CONFIG = process_reward.Config(**(SHARED | {"data": DATA}), step_mark=";")
WIDTHS = {"prompt_length": 8, "response_length": 18}


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT on sums of one digit, and a process reward model from it."""
    root = tmp_path_factory.mktemp("process")
    sft.run(dataclasses.replace(SFT, data=DATA), root / "sft", stop=STOP)
    process_reward.run(CONFIG, root / "process", init_from=str(root / "sft"), stop=STOP)
    return root


def encode(row, step_mark=";", **changes):
    tokenizer = arithmetic.arithmetic_tokenizer()
    return batches.encode_process_steps([row], tokenizer, step_mark=step_mark, **(WIDTHS | changes))


ROW = ProcessSteps(prompt="7+5=", steps=("7+5+0=11", "1", "#### 11"), labels=(0.0, None, 0.75), source="a:1")


def test_a_label_stands_at_the_token_that_ends_its_step():
    """By hand: " 7+5+0=11;1;#### 11" and EOS; marks at 9 and 11, the end at 19."""
    encoded, _ = encode(ROW, response_length=20)
    (batch, _), = batches.eval_batches(encoded, 1)  # fmt: skip
    assert np.flatnonzero(batch.step_mask[0]).tolist() == [9, 19]
    assert batch.step_labels[0, [9, 19]].tolist() == [0.0, 0.75]
    assert batch.responses.response_mask[0].sum() == 20
    # Cut to 18 tokens the last step has lost its end, and so its label.
    cut, report = encode(ROW, truncation="keep_start")
    assert cut.rows[0].judged == ((9, 0.0),) and len(report.truncated) == 1


def test_steps_that_hold_the_mark_are_refused_or_left_out():
    bad = dataclasses.replace(ROW, steps=("7+5;0", "1", "2"))
    with pytest.raises(
        InputError, match="a:1 has 3 steps, and 4 when divided at ';': give a --config.step_mark"
    ):
        encode(bad)
    tokenizer = arithmetic.arithmetic_tokenizer()
    kept, report = batches.encode_process_steps(
        [bad, ROW], tokenizer, step_mark=";", truncation="drop", prompt_length=8, response_length=20
    )
    assert [row.row.source for row in kept.rows] == ["a:1"] and report.dropped[0][0] == "a:1"
    assert kept.rows[0].row is ROW
    with pytest.raises(InputError, match="no token with 'x' in it, so that none marks the end of a step"):
        encode(ROW, step_mark="x")


def test_embedded_rows_are_the_demonstrations_with_their_labels():
    split = inputs.load_process_steps(DATA)
    told = [row.response for row in arithmetic.demonstrations(DATA.arithmetic)]
    texts = [";".join(row.steps) for row in split.train]
    same = np.mean([text == response for text, response in zip(texts, told, strict=True)])
    assert 0.4 < same < 0.65, "half are spoiled, now and then by the digit that was there"
    plain = dataclasses.replace(DATA, arithmetic=dataclasses.replace(DATA.arithmetic, spoiled_rate=0.0))
    assert [";".join(row.steps) for row in inputs.load_process_steps(plain).train] == told
    assert {len(row.steps) for row in split.train} == {1, 2, 3}
    wrong_last = np.mean([row.labels[-1] == 0 for row in split.train])
    assert 0.1 < wrong_last < 0.5, "answers that do not follow from the steps are among them"
    assert all(
        list(row.labels) == arithmetic.step_labels(row.prompt, ";".join(row.steps)) for row in split.held_out
    )
    trained = {row.prompt for row in split.train}
    assert len(split.held_out) == 24 and not trained & {row.prompt for row in split.held_out}
    assert 0.1 < np.mean([row.labels[0] == 0 for row in split.train]) < 0.5, "the demonstrator slips"
    with pytest.raises(InputError, match="reviews has no steps to judge; give --config.data.path"):
        inputs.load_process_steps(DataConfig())


def test_files_of_steps_are_read(tmp_path):
    path = tmp_path / "steps.jsonl"
    record = {"completions": ["a", "b"], "labels": [True, False]}
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", **record}) for i in range(10)))
    split = inputs.load_process_steps(DataConfig(path=str(path)))
    assert (len(split.train), len(split.held_out)) == (9, 1)
    assert split.train[0].steps == ("a", "b") and split.train[0].labels == (1.0, 0.0)


def test_what_is_measured_by_hand():
    logits, labels = np.array([2.0, -1.0, 0.5, -3.0]), np.array([1.0, 1.0, 0.0, 0.0])
    found = process_reward.measure(logits, labels)
    expected = [
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(1)),
        math.log1p(math.exp(0.5)),
        math.log1p(math.exp(-3)),
    ]
    assert found["eval/loss"] == pytest.approx(np.mean(expected))
    assert (found["eval/accuracy"], found["eval/constant_accuracy"], found["eval/wrong_found"]) == (
        0.5,
        0.5,
        0.5,
    )
    assert "eval/wrong_found" not in process_reward.measure(logits, np.ones(4))


def test_the_stage_learns_and_says_what_it_is(runs, tmp_path):
    config = dataclasses.replace(CONFIG, schedule=Schedule(num_steps=150))
    process_reward.run(config, tmp_path, init_from=str(runs / "sft"), stop=STOP)
    rows = rows_of(tmp_path)
    # Less than the entropy of right and wrong, which is what the best constant answer pays.
    share = rows[-1]["eval/constant_accuracy"]
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert rows[-1]["eval/loss"] < entropy < rows[0]["eval/loss"]
    facts = checkpoints.load_handoff(tmp_path)[0].facts
    assert facts["step_mark"] == ";" and facts["eval/accuracy"] == rows[-1]["eval/accuracy"]


def test_a_stopped_run_ends_in_the_bits_of_an_undisturbed_one(runs, tmp_path):
    with pytest.raises(Exception, match="run the same command again"):
        process_reward.run(CONFIG, tmp_path, init_from=str(runs / "sft"), stop=StopAfter(2))
    process_reward.run(CONFIG, tmp_path, init_from=str(runs / "sft"), stop=STOP)
    jax.tree.map(np.testing.assert_array_equal, params_of(runs / "process"), params_of(tmp_path))


def rollout_of(model, texts):
    """Rollouts that say ``texts``, EOS where there is room for it."""
    tokenizer, width = model.tokenizer, 18
    prompt = np.array([tokenizer.bos_token_id, *tokenizer("3+4=", add_special_tokens=False)["input_ids"]])
    tokens = np.full((len(texts), len(prompt) + width), tokenizer.pad_token_id)
    mask = np.zeros((len(texts), width), bool)
    for row, text in enumerate(texts):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:width]
        tokens[row] = np.concatenate([prompt, ids, tokens[row, len(prompt) + len(ids) :]])
        mask[row, : len(ids)] = True
    full = np.concatenate([np.ones((len(texts), len(prompt)), bool), mask], axis=1)
    zeros = jnp.zeros(mask.shape)
    return Rollout(
        tokens=jnp.asarray(tokens),
        token_mask=jnp.asarray(full),
        response_mask=jnp.asarray(mask),
        log_probs=zeros,
        terminated=jnp.ones(len(texts), bool),
        policy_step=jnp.int32(0),
    )


def test_steps_of_a_rollout_are_scored_where_they_end(runs):
    """Each score is the sigmoid of the head on the hidden state of the text up to there, and nothing after."""
    model = load_handoff_model(runs / "process")
    texts = ["3+4+0=7;#### 7", "3;", "", "1" * 30]
    reward = {
        kind: rewards.process_reward(model, rewards.Scoring(steps=kind))
        for kind in ("minimum", "product", "last")
    }
    rollout = rollout_of(model, texts)
    scores, ends = map(np.asarray, reward["minimum"].of_steps(rollout, [None] * 4))
    where = [np.flatnonzero(row).tolist() for row in ends]
    assert where == [[7, 14], [1, 2], [0], [17]]
    assert (scores[~ends] == 0).all()
    head = jax.tree.map(np.asarray, model.params["head"])
    hidden = np.asarray(
        decoder.hidden_states(
            model.config, model.params, rollout.tokens[:1, :13], rollout.token_mask[:1, :13]
        )
    )
    expected = 1 / (1 + np.exp(-(hidden[0, -1].astype(np.float64) @ head["kernel"] + head["bias"])))
    assert scores[0, 7] == pytest.approx(expected, rel=1e-4), (
        "five prompt tokens and the first eight of the response"
    )
    for kind, of in (("minimum", min), ("product", math.prod), ("last", lambda values: values[-1])):
        found = np.asarray(reward[kind].of_rows(rollout, [None] * 4))
        np.testing.assert_allclose(found, [of(scores[i][ends[i]].tolist()) for i in range(4)], rtol=1e-5)


def test_a_right_answer_is_added_where_the_last_step_ends(runs):
    """3+4 is 7: the first row is right, the second wrong, the third says nothing, the fourth is cut off."""
    model = load_handoff_model(runs / "process")
    rollout = rollout_of(model, ["3+4+0=7;#### 7", "3+4+0=7;#### 8", "", "#### 7;" + "1" * 30])
    plain = rewards.process_reward(model, rewards.Scoring(steps="product"))
    rows = [Prompt(prompt="3+4=", answer="7", source="a:1")] * 4
    answer = rewards._answer_reward(model.tokenizer)
    right = np.asarray(answer(rollout, rows))
    assert right.tolist() == [1.0, 0.0, 0.0, 0.0]
    both = rewards.with_answer(plain, answer, 0.5)
    np.testing.assert_allclose(
        both.of_rows(rollout, rows), plain.of_rows(rollout, rows) + 0.5 * right, rtol=1e-6
    )
    before, ends = map(np.asarray, plain.of_steps(rollout, rows))
    after, same = map(np.asarray, both.of_steps(rollout, rows))
    np.testing.assert_array_equal(ends, same)
    expected = before.copy()
    expected[0, 14] += 0.5  # " 3+4+0=7;#### 7" is 14 tokens, and EOS ends the last step
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    of_model = rewards.with_answer(rewards.Reward(of_rows=plain.of_rows), answer, 0.5)
    assert of_model.of_steps is None


def test_a_reward_of_answers_has_no_answers_to_add(runs, ladder, tmp_path):
    with pytest.raises(InputError, match="answer_weight is 1.0, which config.reward=answer does not read"):
        wrong = dataclasses.replace(GRPO, reward="answer", answer_weight=1.0)
        grpo.run(wrong, tmp_path / "a", init_from=str(runs / "sft"), stop=STOP)
    with pytest.raises(InputError, match="has no answer, which config.answer_weight=1.0 needs"):
        wrong = dataclasses.replace(GRPO, reward="model", answer_weight=1.0, data=SFT.data)
        where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
        grpo.run(wrong, tmp_path / "b", stop=STOP, **where)


GRPO = grpo.Config(
    **(SHARED | {"data": DATA, "batch_size": 32}),
    group_size=4,
    num_eval_prompts=12,
    reward="process",
    beta=0.0,
)


PPO_STEPS = ppo.Config(
    **(SHARED | {"data": DATA, "schedule": Schedule(num_steps=2, log_every=1)}),
    num_epochs=1,
    num_eval_prompts=12,
    reward="process",
    credit="step",
    scoring=Scoring(steps="last"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("credit", "answer_weight"), [("response", 0.0), ("step", 0.0), ("step", 0.5)])
def test_grpo_raises_what_the_process_reward_model_likes(credit, answer_weight, runs, tmp_path):
    config = dataclasses.replace(
        GRPO,
        credit=credit,
        answer_weight=answer_weight,
        schedule=Schedule(num_steps=30),
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant"),
        num_eval_prompts=24,
        eval_responses_per_prompt=4,
    )
    where = {"init_from": str(runs / "sft"), "reward_from": str(runs / "process")}
    grpo.run(config, tmp_path, stop=STOP, **where)
    rows = rows_of(tmp_path)
    assert abs(rows[1]["kl"]) < 1e-5 and rows[1]["approx_kl"] < 1e-9
    assert rows[-1]["eval/proxy"] > rows[0]["eval/proxy"] + 0.02


def test_ppo_is_paid_as_steps_end(runs):
    """With no leash, no critic and no discount, returns are what the steps still to end will add."""
    model = load_handoff_model(runs / "sft")
    rollout = rollout_of(model, ["3+4+0=7;#### 7"])
    score = np.zeros((1, 18), np.float32)
    score[0, [7, 14]] = 0.75, 0.25
    scored = ScoredRollout(
        rollout=rollout, scores=jnp.array([9.0]), step_scores=jnp.asarray(score), step_mask=score > 0
    )
    config = dataclasses.replace(PPO_STEPS, beta=0.0, gamma=1.0, lam=1.0)
    policy = {"decoder": jax.device_get(model.params["decoder"])}
    value = policy | {"head": heads.zero_scalar_head(model.config)}
    batch, metrics = jax.jit(ppo.make_prepare(model.config, model.config, config))(
        {"policy": policy, "value": value}, policy, scored, jnp.float32(0.0)
    )
    # Up to column 7 both steps are to come, 0.75 and then 0.25 - 0.75; up to 14 the second; then nothing.
    np.testing.assert_allclose(batch.returns[0], [0.25] * 8 + [-0.5] * 7 + [0.0] * 3, atol=1e-6)
    assert float(metrics["score"].mean()) == 9.0


@pytest.mark.parametrize("reward", ["process", pytest.param("sentiment", marks=pytest.mark.slow)])
def test_ppo_takes_rewards_that_are_no_reward_model(reward, runs, ladder, tmp_path):
    if reward == "process":
        config = dataclasses.replace(PPO_STEPS, answer_weight=0.5)
        where = {"init_from": str(runs / "sft"), "reward_from": str(runs / "process")}
    else:
        config = dataclasses.replace(PPO_STEPS, reward=reward, credit="response", data=SFT.data)
        where = {"init_from": ladder.sft}
    ppo.run(config, tmp_path, stop=STOP, **where)
    rows = rows_of(tmp_path)
    assert abs(rows[1]["kl"]) < 1e-5 and rows[-1]["eval/kl"] > 1e-4
    # The critic starts from 0, so that it explains nothing of the first returns.
    assert rows[1]["value_explained_variance"] < 1e-3


def test_ppo_without_a_reward_model_takes_none(runs, tmp_path):
    with pytest.raises(InputError, match="is given, which config.reward=answer does not read; leave one out"):
        config = dataclasses.replace(PPO_STEPS, reward="answer", credit="response")
        where = {"init_from": str(runs / "sft"), "reward_from": str(runs / "process")}
        ppo.run(config, tmp_path, stop=STOP, **where)


def test_ppo_refuses_what_does_not_go_with_credit_by_steps():
    for change in ({"reward": "model"}, {"missing_eos_score": -1.0}):
        with pytest.raises(
            InputError, match=f"config.{next(iter(change))} is .* with which credit=step does"
        ):
            dataclasses.replace(PPO_STEPS, **change)
    with pytest.raises(
        InputError, match="config.scoring.steps is 'minimum', and what credit=step pays adds up to"
    ):
        dataclasses.replace(PPO_STEPS, scoring=Scoring())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reward": "answer"},
            "config.reward is 'answer', with which credit=step does not go; give 'process'",
        ),
        (
            {"baseline": "batch"},
            "config.baseline is 'batch', with which credit=step does not go; give 'group'",
        ),
        ({"missing_eos_score": -1.0}, "config.missing_eos_score is -1.0, with which credit=step"),
        (
            {"kl_in": "reward", "beta": 0.1},
            "config.kl_in is 'reward', with which credit=step does not go; give 'loss'",
        ),
    ],
)
def test_what_does_not_go_with_credit_by_steps_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GRPO, credit="step", **change)


def test_the_two_kinds_of_reward_model_are_not_taken_for_one_another(runs, ladder, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    with pytest.raises(
        InputError, match="is a reward model of steps; give a run of experiments.reward_model, or --conf"
    ):
        where = {"init_from": str(runs / "sft"), "reward_from": str(runs / "process")}
        grpo.run(dataclasses.replace(GRPO, reward="model"), one, stop=STOP, **where)
    with pytest.raises(
        InputError, match="is a reward model of responses; give a run of experiments.process_reward"
    ):
        where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
        grpo.run(dataclasses.replace(GRPO, data=SFT.data), other, stop=STOP, **where)
    with pytest.raises(
        InputError, match="'process', which needs --reward_from=<run of experiments.process_reward>"
    ):
        grpo.run(GRPO, tmp_path / "none", init_from=str(runs / "sft"), stop=STOP)
