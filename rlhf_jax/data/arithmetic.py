"""Embedded arithmetic: sums worked out step by step, with known answers and known step labels; no jax, only numpy.

A prompt is "17+25=". A worked answer adds digit by digit from the right, carrying: "7+5+0=12;1+2+1=4;#### 42". The
demonstrator slips: each digit sum is off by one with probability ``slip_rate``, and what follows is worked out from
what was written. With three digits and a slip rate of 0.3 a demonstration is right in 0.7^3 = 34% of the cases, so
that a policy that imitates perfectly has an exact match of 34% at temperature 1, while the most probable
continuation of every step is the right one: what reinforcement learning has to find is there to be found.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.rows import Demonstration, ProcessSteps, Prompt
from rlhf_jax.errors import check_range

# Independent streams of randomness; a number here must never change its meaning.
_STREAMS = {
    "demonstrations/train": 0,
    "prompts/train": 1,
    "prompts/eval": 2,
    "demonstrations/eval": 3,
    "spoiling/train": 4,
    "spoiling/eval": 5,
}
# What stands between the steps of a worked answer.
STEP_MARK = ";"
_SUM = re.compile(r"(\d+)\+(\d+)=")
_STEP = re.compile(r"(\d)\+(\d)\+(\d)=(\d{1,2})")
_CHARACTERS = "0123456789+=;# "


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Which sums, and how many.

    seed: of every row. num_digits: of both operands. slip_rate: probability that one digit sum of a demonstration is
    off by one. spoiled_rate: share of the answers with labelled steps that are spoiled by more than slips: a step left
    out or said twice, or a digit changed. num_demonstrations, num_prompts, num_eval_prompts: rows of each kind; sums
    held out for evaluation are never trained on.
    """

    seed: int = 0
    num_digits: int = 3
    slip_rate: float = 0.3
    spoiled_rate: float = 0.5
    num_demonstrations: int = 16384
    num_prompts: int = 8192
    num_eval_prompts: int = 256

    def __post_init__(self) -> None:
        check_range(self, "seed", "num_demonstrations", "num_prompts", "num_eval_prompts", at_least=0)
        check_range(self, "num_digits", at_least=1, at_most=9)
        check_range(self, "slip_rate", "spoiled_rate", at_least=0, at_most=1)


def work_out(first: int, second: int, slips: Sequence[int] = ()) -> str:
    """The worked answer of ``first + second``; ``slips`` are added to the digit sums, from the right."""
    width = max(len(str(first)), len(str(second)))
    pairs = zip(reversed(f"{first:0{width}}"), reversed(f"{second:0{width}}"), strict=True)
    written, carry, digits = [], 0, ""
    for place, (a, b) in enumerate(pairs):
        # A sum of digits is never below 0 or above 19, so that every slip can be written and carried.
        total = int(a) + int(b) + carry + (slips[place] if place < len(slips) else 0)
        total = min(max(total, 0), 19)
        written.append(f"{a}+{b}+{carry}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    answer = (str(carry) if carry else "") + digits
    return STEP_MARK.join([*written, f"#### {answer.lstrip('0') or '0'}"])


def step_labels(prompt: str, response: str) -> list[bool]:
    """Whether each step (what stands between semicolons) is right, given the prompt and the steps before it.

    A digit sum is right if it adds the digits at its place and the carry of the step before, correctly. The last
    step is right if it writes the digits that the steps gave. Any two strings are valid input; a step that is no
    step at all, or one too many, is wrong.
    """
    asked = _SUM.fullmatch(prompt.strip())
    steps = response.strip().split(STEP_MARK)
    if asked is None:
        return [False] * len(steps)
    width = max(map(len, asked.groups()))
    first, second = (number.zfill(width)[::-1] for number in asked.groups())
    labels, carry, digits = [], 0, ""
    for place, step in enumerate(steps):
        if place >= width:
            answer = ((str(carry) if carry else "") + digits).lstrip("0") or "0"
            labels.append(place == width and step.strip() == f"#### {answer}")
            continue
        found = _STEP.fullmatch(step.strip())
        right = found is not None and (found[1], found[2], found[3]) == (
            first[place],
            second[place],
            str(carry),
        )
        total = int(found[4]) if found is not None else 0
        labels.append(right and total == int(first[place]) + int(second[place]) + carry)
        carry, digits = total // 10, f"{total % 10}{digits}"
    return labels


def demonstrations(config: ArithmeticConfig) -> list[Demonstration]:
    """``num_demonstrations`` worked answers, with the demonstrator's slips."""
    return [_demonstration(config, "train", index) for index in range(config.num_demonstrations)]


def process_steps(config: ArithmeticConfig, split: str) -> list[ProcessSteps]:
    """Worked answers with the label of every step (`step_labels`).

    ``split`` "train" has those of `demonstrations`; "eval" has ``num_eval_prompts`` answers to sums that are held out.
    ``spoiled_rate`` of both are spoiled first: the demonstrator always writes every step, and a last one that follows
    from them, so that a judge who has seen nothing else takes any "#### 7" for right.
    """
    rows = []
    for index in range(config.num_demonstrations if split == "train" else config.num_eval_prompts):
        row = _demonstration(config, split, index)
        response, rng = row.response, _rng(config, f"spoiling/{split}", index)
        if rng.random() < config.spoiled_rate:
            response = _spoil(rng, response)
        labels = step_labels(row.prompt, response)
        rows.append(
            ProcessSteps(
                prompt=row.prompt,
                steps=tuple(response.split(STEP_MARK)),
                labels=tuple(map(float, labels)),
                source=row.source,
            )
        )
    return rows


def _spoil(rng: np.random.Generator, response: str) -> str:
    """The response with one step left out, one said twice, or one digit replaced by any, each one time in three."""
    steps = response.split(STEP_MARK)
    place, kind = int(rng.integers(len(steps))), rng.integers(3)
    if kind == 0 and len(steps) > 1:
        del steps[place]
    elif kind == 1:
        steps.insert(place, steps[place])
    else:
        digits = [i for i, character in enumerate(steps[place]) if character.isdigit()]
        at = int(rng.choice(digits))
        steps[place] = f"{steps[place][:at]}{rng.integers(10)}{steps[place][at + 1 :]}"
    return STEP_MARK.join(steps)


def _demonstration(config: ArithmeticConfig, split: str, index: int) -> Demonstration:
    rng = _rng(config, f"demonstrations/{split}", index)
    first, second = _operands(rng, config.num_digits, held_out=split == "eval")
    slipped = rng.random(config.num_digits) < config.slip_rate
    slips = np.where(slipped, rng.choice([-1, 1], config.num_digits), 0)
    return Demonstration(
        prompt=f"{first}+{second}=",
        response=work_out(first, second, slips.tolist()),
        source=f"arithmetic:demonstrations/{index}" + ("/eval" if split == "eval" else ""),
    )


def prompts(config: ArithmeticConfig, split: str) -> list[Prompt]:
    """Sums with their answers; ``split`` is "train" or "eval", whose sums do not overlap."""
    stream, count = f"prompts/{split}", config.num_prompts if split == "train" else config.num_eval_prompts
    rows = []
    for index in range(count):
        first, second = _operands(_rng(config, stream, index), config.num_digits, held_out=split == "eval")
        rows.append(
            Prompt(
                prompt=f"{first}+{second}=", answer=str(first + second), source=f"arithmetic:{stream}/{index}"
            )
        )
    return rows


def _operands(rng: np.random.Generator, num_digits: int, *, held_out: bool) -> tuple[int, int]:
    """Two numbers of ``num_digits`` digits; one sum in eight, by a fixed rule of its operands, is held out."""
    while True:
        first, second = rng.integers(10 ** (num_digits - 1), 10**num_digits, 2).tolist()
        if ((first * 31 + second * 17) % 8 == 0) == held_out:
            return first, second


def _rng(config: ArithmeticConfig, stream: str, index: int) -> np.random.Generator:
    """Depends on seed, stream and row alone, so that more rows leave the first unchanged."""
    sequence = np.random.SeedSequence(entropy=config.seed, spawn_key=(_STREAMS[stream], index))
    return np.random.Generator(np.random.PCG64(sequence))


@functools.cache
def _token_ids() -> dict[str, int]:
    return {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *_CHARACTERS))}


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, plus <pad>, <s>, </s>, <unk>; decoding gives back the text that was encoded."""
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(_token_ids()), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
