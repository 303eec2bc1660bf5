"""A judge as what a stage optimises: a program of the user's own, or a language model. Imports all below."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import ai_feedback, judges
from rlhf_jax.sampling.prompts import bucket_width, pad_prompts
from rlhf_jax.stages.handoffs import Model
from rlhf_jax.stages.rollouts import answers, make_rollout
from rlhf_jax.stages.run_directory import Purpose, Run
from rlhf_jax.types import Rollout

# A judge, asked: (rollout of B rows, the data row that each answers) -> what it says of them.
Ask = Callable[[Rollout, Sequence[Any]], judges.Judged]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who judges, where config.reward is "judge": a program, or the language model of ``--judge_from``.

    command: a program with its arguments, started once, that answers lines of JSON (``rewards.judges``). seconds: for
    one question; what is late is no verdict. failures: so many questions in a row without a verdict end the run.
    principle: by which a language model chooses between two responses (``rewards.ai_feedback``); template: what it is
    shown, with {prompt}, {principle}, {first} and {second}; choices: the two words, of one token each, that it may go
    on with.
    """

    command: str = ""
    seconds: float = 30.0
    failures: int = 10
    principle: str = ai_feedback.PRINCIPLE
    template: str = ai_feedback.TEMPLATE
    choices: tuple[str, ...] = ("A", "B")

    def __post_init__(self) -> None:
        check_range(self, "seconds", above=0)
        check_range(self, "failures", at_least=1)
        if len(set(self.choices)) != 2 or len(self.choices) != 2:
            raise InputError(f"config.judge.choices is {self.choices}; give two different words")
        try:
            shown = self.template.format(
                prompt="\0prompt", principle="\0principle", first="\0first", second="\0second"
            )
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"config.judge.template cannot be filled in ({error!r}); its names are {{prompt}}, {{principle}}, "
                "{first} and {second}, and any other brace is written twice"
            ) from None
        if shown.count("\0first") != 1 or shown.count("\0second") != 1 or "\0prompt" not in shown:
            raise InputError(
                "config.judge.template must have {first} and {second}, each of them once, and {prompt}"
            )
        if "\0principle" not in shown and self.principle != ai_feedback.PRINCIPLE:
            raise InputError(
                "config.judge.principle is given, and config.judge.template has no {principle} that would show it; add "
                "it, or leave the principle out"
            )


def check(config: Any, judge_from: str) -> None:
    """Refuses a judge that nothing asks, a stage that asks none, and what no verdict cannot be added to.

    ``config``: a stage's; ``reward``, ``judge`` and ``answer_weight`` are read.

    Raises:
      InputError: names the option.
    """
    options, default = config.judge, JudgeOptions()
    if config.reward != "judge":
        if options != default or judge_from:
            raise InputError(
                f"config.judge.* or --judge_from is given, which config.reward={config.reward} does not read; give "
                "config.reward=judge, or leave it out"
            )
        return
    if bool(options.command) == bool(judge_from):
        in_groups = " or, where a stage draws groups, --judge_from=<a language model>, and not both"
        raise InputError(
            "config.reward is 'judge', which needs config.judge.command=<program and arguments>"
            f"{in_groups if hasattr(config, 'group_size') else ''}; give one"
        )
    unread = ("seconds", "failures") if judge_from else ("principle", "template", "choices")
    for name in unread:
        if getattr(options, name) != getattr(default, name):
            who = "a language model" if judge_from else "a program"
            raise InputError(
                f"config.judge.{name} is given, which {who} as judge does not read; leave it out"
            )
    if config.answer_weight:
        raise InputError(
            f"config.answer_weight is {config.answer_weight}, which cannot be added where a judge gives no verdict; "
            "give 0, and let the judge look at the answer"
        )
    if judge_from and getattr(config, "group_size", 1) < 2:
        raise InputError(
            f"--judge_from={judge_from} compares the responses to a prompt, and this stage draws one; give a "
            "group_size of 2 or more, of GRPO, online DPO or rejection sampling"
        )


def ask_command(judge: judges.CommandJudge, tokenizer: Any, *, group_size: int) -> Ask:
    """``ask(rollout, data rows)``: the first process asks, ``group_size`` rows at a time, and all get the answer."""

    def ask(rollout: Rollout, rows: Sequence[Any]) -> judges.Judged:
        responses = policies.response_texts(tokenizer, hosts.fetch(rollout))
        prompts = [row.prompt for row in rows]

        def decide() -> dict[str, Any]:
            found = judges.judge_groups(judge, prompts, responses, group_size)
            return {
                "scores": found.scores.tolist(),
                "has_verdict": found.has_verdict.tolist(),
                "reasons": dict(found.reasons),
            }

        found = hosts.decided_by_main(decide)
        return judges.Judged(
            scores=np.asarray(found["scores"], np.float32),
            has_verdict=np.asarray(found["has_verdict"], bool),
            reasons=found["reasons"],
        )

    return ask


def or_nan(ask: Ask) -> policies.RowReward:
    """The scores [B] float32, NaN where there is no verdict: what an evaluation leaves out."""

    def of_rows(rollout: Rollout, rows: Sequence[Any]) -> np.ndarray:
        found = ask(rollout, rows)
        return np.where(found.has_verdict, found.scores, np.float32(np.nan))

    return of_rows


def ask_model(
    judge: Model, options: JudgeOptions, tokenizer: Any, run: Run, *, batch_size: int, group_size: int
) -> Ask:
    """``ask(rollout, data rows)``: of each response the mean probability of beating the others of its group.

    A group of which one question is too long for the judge has no verdict.

    Args:
      judge: a language model, whose tokenizer may be another than the policy's.
      options: principle, template and choices are read.
      tokenizer: the policy's.
      run: gives the mesh.
      batch_size: questions that are answered at once; a group of G has G (G - 1).
      group_size: responses a prompt, at least 2, one after another.

    Raises:
      InputError: a choice is not one token.
    """
    answer = _make_answer(judge, options, run, batch_size)
    places = list(itertools.permutations(range(group_size), 2))

    def ask(rollout: Rollout, rows: Sequence[Any]) -> judges.Judged:
        texts = policies.response_texts(tokenizer, hosts.fetch(rollout))
        groups = range(0, len(texts), group_size)
        asked = [
            (rows[start].prompt, texts[start + i], texts[start + j]) for start in groups for i, j in places
        ]
        found = np.zeros((len(groups), group_size, group_size, 2), np.float32)
        found[:, *np.transpose(places)] = answer(asked).reshape(len(groups), len(places), 2)
        has_verdict = np.isfinite(found).all(axis=(1, 2, 3))
        rates = np.asarray(ai_feedback.win_rates(np.where(has_verdict[:, None, None, None], found, 0.0)))
        return _verdicts(np.where(has_verdict[:, None], rates, 0.0), has_verdict)

    return ask


def beats_initial(
    judge: Model,
    options: JudgeOptions,
    config: Any,
    run: Run,
    model: Model,
    held_out: batches.Encoded,
) -> policies.RowReward:
    """What an evaluation asks of a language model: the probability of beating the initial policy's response, [B].

    The initial policy answers each held-out prompt once; a resumed run samples the same anew. NaN where there is no
    verdict.

    Args:
      judge, options: see `ask_model`.
      config: the stage's; ``sampling``, ``seed`` and ``batch_size`` are read.
      run: gives mesh and key.
      model: the initial policy.
      held_out: prompts.
    """
    answer = _make_answer(judge, options, run, config.batch_size)
    rollout, key = make_rollout(run, model, config.sampling), run.key(config.seed, Purpose.SCALE)
    params, opponents = {"decoder": model.params["decoder"]}, {}
    for said, rows, real in answers(rollout, params, held_out, key, batch_size=config.batch_size):
        texts = policies.response_texts(model.tokenizer, hosts.fetch(said))
        for place in np.arange(len(rows))[real]:
            opponents.setdefault(rows[place].prompt, texts[place])

    def of_rows(rollout: Rollout, rows: Sequence[Any]) -> np.ndarray:
        texts = policies.response_texts(model.tokenizer, hosts.fetch(rollout))
        asked = [(row.prompt, text, opponents[row.prompt]) for row, text in zip(rows, texts, strict=True)]
        as_first = answer(asked)
        as_second = answer([(prompt, second, first) for prompt, first, second in asked])
        return np.asarray(ai_feedback.win_probability(as_first, as_second))

    return of_rows


def _verdicts(scores: np.ndarray, has_verdict: np.ndarray) -> judges.Judged:
    """``scores`` [N, G] and ``has_verdict`` [N] of groups, as rows one group after another."""
    reasons = {name: 0 for name in judges.REASONS} | {"too_long": int((~has_verdict).sum())}
    return judges.Judged(
        scores=scores.reshape(-1).astype(np.float32),
        has_verdict=np.repeat(has_verdict, scores.shape[1]),
        reasons=reasons,
    )


def _make_answer(
    judge: Model, options: JudgeOptions, run: Run, batch_size: int
) -> Callable[[Sequence[tuple[str, str, str]]], np.ndarray]:
    """``answer([(prompt, first, second)]) -> [Q, 2]``: log-probs of the choices; NaN where a question is too long."""
    choices = tuple(_choice(judge, options, word) for word in options.choices)
    limit, pad_id = judge.config.max_length, tokenizers.pad_id(judge.tokenizer)
    params = {"decoder": judge.params["decoder"]}
    log_probs = sharding.within(
        run.mesh,
        jax.jit(
            lambda params, tokens, mask: ai_feedback.choice_log_probs(
                judge.config, params, tokens, mask, choices
            )
        ),
    )

    def answer(asked: Sequence[tuple[str, str, str]]) -> np.ndarray:
        ids = [tokenizers.encode_prompt(judge.tokenizer, _question(options, *question)) for question in asked]
        found = np.full((len(ids), 2), np.nan, np.float32)
        fitting = [number for number, question in enumerate(ids) if len(question) <= limit]
        if not fitting:
            return found
        # One width for all, so that few programs are compiled; the last batch is filled up with its first question.
        width = bucket_width(max(len(ids[number]) for number in fitting), limit=limit)
        for start in range(0, len(fitting), batch_size):
            part = fitting[start : start + batch_size]
            filled = part + part[:1] * (batch_size - len(part))
            arrays = pad_prompts([ids[number] for number in filled], width=width, pad_id=pad_id)
            scores = hosts.fetch(log_probs(params, *meshes.put_rows(run.mesh, arrays)))
            found[part] = scores[: len(part)]
        return found

    return answer


def _question(options: JudgeOptions, prompt: str, first: str, second: str) -> str:
    return options.template.format(prompt=prompt, principle=options.principle, first=first, second=second)


def _choice(judge: Model, options: JudgeOptions, word: str) -> int:
    """The token of a choice, where the model has to answer.

    Raises:
      InputError: it is none, or not one, or changes how the question is divided.
    """
    question = _question(options, "p", "q", "r")
    before = tokenizers.encode_prompt(judge.tokenizer, question)
    after = tokenizers.encode_prompt(judge.tokenizer, question + word)
    if after[:-1] != before or after[-1] == judge.tokenizer.unk_token_id:
        raise InputError(
            f"config.judge.choices has {word!r}, which is not one token of {judge.origin} after config.judge.template; "
            "give another word, or end the template where one begins"
        )
    return after[-1]
