"""The embedded world: film reviews with a known gold reward, reproducible from a seed; no jax, only numpy.

Why the constants are what they are (40,000 replies of the writer, seed 0, temperature 1, noise 0.05):

- The writer's gold is 1.12 on average with a standard deviation of 2.02, over 12.1 words (3% have more than 26,
  none more than 42). The greatest gold is 5.5, as of "i loved the charming cast . the acting was bold and
  brilliant .": 2.2 deviations above imitation.
- Length by itself tells little about gold (correlation 0.06) and, with ``length_bias=0.15``, much about utility
  (0.46): the longer reply is then preferred in 65% of the pairs (55% without bias, 72% at 0.3). Bayes accuracy:
  0.79 at bias 0, 0.81 at 0.15, 0.83 at 0.3.
- The policy proportional to writer * exp(utility / beta), which is what a perfect reward model and a perfect
  optimiser would reach, has at bias 0.15 a gold of 2.40, 3.33, 4.32, 4.72, 4.92 at KL 0.3, 1.0, 2.7, 4.1, 5.1
  nats, with 15, 18, 23, 26, 27 words: up to 26 words gold and length rise together.
- A word beyond 26 costs the asker 0.2 and pays the labeller 0.15 before that cost, so that even the labeller likes
  the best reply of 26 words (gold 5.5, utility 9.4) better than that of 47, the length limit (1.3 and 8.35). But few
  replies show it: a reward model that learned from the others that longer is better goes on paying for words, and
  gold falls. Goodhart's curve is that of the learned reward.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import grammar
from rlhf_jax.data.rows import Comparison, Demonstration, Preference, Prompt, Ranking
from rlhf_jax.errors import InputError

# What labellers who want it short take off for every word.
BRIEF_BIAS = -1.0
# Independent streams of randomness; a number here must never change its meaning.
_STREAMS = {
    "demonstrations/train": 0,
    "preferences/train": 1,
    "preferences/eval": 2,
    "prompts/train": 3,
    "prompts/eval": 4,
    "rankings/train": 5,
}
_WORD = re.compile(r"<[^<>\s]*>|\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldWeights:
    """What the gold reward pays for and charges for; see `gold_components`."""

    sentiment: float = 1.0
    sentiment_limit: int = 4
    topic: float = 0.5
    topic_limit: int = 1
    ending: float = 1.0
    repetition: float = 0.2
    filler: float = 0.25
    padding: float = 0.2
    padding_budget: int = 26


GOLD = GoldWeights()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Which world, and how much of it.

    seed: of every row. noise: probability in [0, 0.5] that a label is flipped, whatever the utilities.
    length_bias: utility that the labeller gives per word, beyond gold.
    temperature: utilities are divided by it before the Bradley-Terry sigmoid; > 0.
    num_demonstrations, num_preferences, num_prompts, num_eval_prompts, num_eval_preferences: rows of each kind; where
    rankings are asked for there are as many as preferences otherwise.
    Training and evaluation rows have separate streams and share no prompt.
    """

    seed: int = 0
    noise: float = 0.05
    length_bias: float = 0.0
    temperature: float = 1.0
    num_demonstrations: int = 4096
    num_preferences: int = 8192
    num_prompts: int = 4096
    num_eval_prompts: int = 256
    num_eval_preferences: int = 2048

    def __post_init__(self):
        if self.seed < 0:
            raise InputError(f"world seed is {self.seed}: give a seed of 0 or more.")
        if not 0.0 <= self.noise <= 0.5:
            raise InputError(f"world noise is {self.noise}: give a label flip probability between 0 and 0.5.")
        if not self.temperature > 0.0:
            raise InputError(f"world temperature is {self.temperature}: give a number above 0.")
        if not math.isfinite(self.length_bias):
            raise InputError(f"world length_bias is {self.length_bias}: give a finite number per word.")
        for field in dataclasses.fields(self):
            if field.name.startswith("num_") and getattr(self, field.name) < 0:
                raise InputError(f"world {field.name} is {getattr(self, field.name)}: give 0 or more.")


def words_of(text: str) -> list[str]:
    """The words of any text in lower case; a mark such as "." is a word, and so is a tag such as "<unk>"."""
    return _WORD.findall(text.lower())


def _repeated_trigrams(words: Sequence[str]) -> int:
    """How many trigrams were said before, full stops being words like others."""
    counts = Counter(zip(words, words[1:], words[2:], strict=False))
    return sum(counts.values()) - len(counts)


def gold_components(prompt: str, response: str, terminated: bool = True) -> dict[str, float]:
    """The terms of the gold reward, of which `gold_reward` is the sum. Any two strings are valid input.

    sentiment:  +1 per distinct sentiment word of the asked kind, up to 4; -1 per distinct one of the other.
    topic:      +0.5 if a word of the asked topic is said.
    ending:     +1 if the last word is a full stop and the response ended by itself (``terminated``), else -1.
    repetition: -0.2 per repeated trigram, without limit.
    filler:     -0.25 per filler word ("really", "very", ...).
    padding:    -0.2 per word beyond 26 (full stops are words).
    """
    ask = grammar.read_ask(words_of(prompt))
    words = words_of(response)
    distinct = frozenset(words)
    sentiment = topic = 0.0
    if ask.sentiment is not None:
        wanted, opposing = (len(distinct & grammar.SENTIMENT_WORDS[s]) for s in grammar.SENTIMENTS)
        if ask.sentiment == "negative":
            wanted, opposing = opposing, wanted
        sentiment = GOLD.sentiment * (min(wanted, GOLD.sentiment_limit) - opposing)
    if ask.topic is not None:
        topic = GOLD.topic * min(len(distinct & grammar.TOPIC_WORDS[ask.topic]), GOLD.topic_limit)
    clean = terminated and bool(words) and words[-1] == "."
    return {
        "sentiment": sentiment,
        "topic": topic,
        "ending": GOLD.ending if clean else -GOLD.ending,
        "repetition": 0.0 - GOLD.repetition * _repeated_trigrams(words),
        "filler": 0.0 - GOLD.filler * sum(word in grammar.FILLERS for word in words),
        "padding": 0.0 - GOLD.padding * max(0, len(words) - GOLD.padding_budget),
    }


def gold_reward(prompt: str, response: str, terminated: bool = True) -> float:
    """What the response is truly worth to the one who asked, at most 5.5: the sum of `gold_components`."""
    # fsum and not sum, which rounds otherwise from Python 3.12 on: rows are the same on every version.
    return math.fsum(gold_components(prompt, response, terminated).values())


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(64).tolist()


def _draw(config: WorldConfig, stream: str, index: int) -> Iterator[float]:
    """Uniforms that depend on seed, stream and row alone, so that more rows leave the first unchanged."""
    sequence = np.random.SeedSequence(entropy=config.seed, spawn_key=(_STREAMS[stream], index))
    return _uniforms(np.random.Generator(np.random.PCG64(sequence)))


def _stream(kind: str, split: str) -> str:
    stream = f"{kind}/{split}"
    if stream not in _STREAMS:
        raise InputError(f"the embedded world has no {kind} split {split!r}: use 'train' or 'eval'.")
    return stream


def demonstrations(config: WorldConfig) -> list[Demonstration]:
    """``num_demonstrations`` replies of the writer, as they come: good ones and bad ones."""
    rows = []
    for index in range(config.num_demonstrations):
        draw = _draw(config, "demonstrations/train", index)
        prompt, *ask = grammar.draw_prompt(draw, "train")
        reply = grammar.draw_reply(draw, *ask)
        rows.append(Demonstration(prompt=prompt, response=reply, source=f"world:demonstrations/{index}"))
    return rows


def prompts(config: WorldConfig, split: str) -> list[Prompt]:
    """Prompts drawn independently; an "eval" prompt pairs a topic and a genre unseen in "train"."""
    stream = _stream("prompts", split)
    count = config.num_prompts if split == "train" else config.num_eval_prompts
    return [
        Prompt(prompt=grammar.draw_prompt(_draw(config, stream, i), split)[0], source=f"world:{stream}/{i}")
        for i in range(count)
    ]


def utility(config: WorldConfig, prompt: str, response: str) -> float:
    """What the labeller believes a response is worth: gold, plus ``length_bias`` per word."""
    return gold_reward(prompt, response) + config.length_bias * len(words_of(response))


def preference_probability(config: WorldConfig, utility_margin: float) -> float:
    """P(first preferred) = noise + (1 - 2 noise) sigmoid(margin / temperature); Bradley and Terry (1952)."""
    scaled = utility_margin / config.temperature
    # tanh form of the sigmoid: no overflow at any margin.
    return config.noise + (1.0 - 2.0 * config.noise) * 0.5 * (1.0 + math.tanh(0.5 * scaled))


def preferences(config: WorldConfig, split: str) -> list[Preference]:
    """Two replies of the writer to one prompt, never the same, labelled by Bradley-Terry on `utility`.

    Labels are those of two kinds of labellers: "preferred", which is the label itself, and "brief", of labellers to
    whom every word is worth `BRIEF_BIAS` beyond gold, in the place of ``length_bias``.
    """
    stream = _stream("preferences", split)
    count = config.num_preferences if split == "train" else config.num_eval_preferences
    return [_draw_preference(config, stream, split, index) for index in range(count)]


def _draw_preference(config: WorldConfig, stream: str, split: str, index: int) -> Preference:
    draw = _draw(config, stream, index)
    prompt, *ask = grammar.draw_prompt(draw, split)
    first = grammar.draw_reply(draw, *ask)
    second = grammar.draw_reply(draw, *ask)
    while second == first:
        second = grammar.draw_reply(draw, *ask)
    margin = utility(config, prompt, first) - utility(config, prompt, second)
    probability = preference_probability(config, margin)
    preferred = next(draw) < probability
    # Drawn last, so that the rows are those of a world with one label. A word is worth BRIEF_BIAS to these labellers.
    extra = len(words_of(first)) - len(words_of(second))
    brief = preference_probability(config, margin + (BRIEF_BIAS - config.length_bias) * extra)
    by_brief = next(draw) < brief
    if not preferred:
        first, second, probability = second, first, 1.0 - probability
    return Preference(
        prompt=prompt,
        chosen=first,
        rejected=second,
        source=f"world:{stream}/{index}",
        group=prompt,
        probability=probability,
        chosen_gold=gold_reward(prompt, first),
        rejected_gold=gold_reward(prompt, second),
        labels=(("preferred", 1.0), ("brief", float(by_brief == preferred))),
    )


def rankings(config: WorldConfig, *, size: int) -> list[Ranking]:
    """``num_preferences`` prompts with ``size`` replies of the writer each, no two the same, in the labeller's order.

    The order is drawn by Plackett and Luce from `utility` / temperature, or with probability 2 * noise from nothing:
    any two replies then are in the order that `preference_probability` says, as those of `preferences` are.
    """
    if size < 2:
        raise InputError(f"the embedded world was asked for rankings of {size}: give at least 2 replies.")
    return [_draw_ranking(config, index, size) for index in range(config.num_preferences)]


def _draw_ranking(config: WorldConfig, index: int, size: int) -> Ranking:
    draw = _draw(config, "rankings/train", index)
    prompt, *ask = grammar.draw_prompt(draw, "train")
    replies: list[str] = []
    while len(replies) < size:
        if (reply := grammar.draw_reply(draw, *ask)) not in replies:
            replies.append(reply)
    at_random = next(draw) < 2.0 * config.noise
    worth = [0.0 if at_random else utility(config, prompt, reply) / config.temperature for reply in replies]
    # The order of utilities plus Gumbel noise is a draw from Plackett-Luce (Yellott 1977); 0 has no logarithm.
    noisy = [value - math.log(-math.log(max(next(draw), 1e-300))) for value in worth]
    comparisons = tuple(
        Comparison(
            first=first,
            second=second,
            for_first=int(noisy[first] > noisy[second]),
            for_second=int(noisy[first] <= noisy[second]),
        )
        for first in range(size)
        for second in range(first + 1, size)
    )
    return Ranking(
        prompt=prompt,
        responses=tuple(replies),
        comparisons=comparisons,
        source=f"world:rankings/train/{index}",
        group=prompt,
    )


def bayes_accuracy(rows: Sequence[Preference]) -> float:
    """The expected accuracy, over the labels' randomness, of the best possible judge: mean max(p, 1 - p).

    No reward model can expect more. Raises InputError where a row's label probability is unknown.
    """
    if not rows:
        raise InputError("the Bayes accuracy of no rows was asked for: give at least one preference pair.")
    total = 0.0
    for row in rows:
        if row.probability is None:
            raise InputError(
                f"{row.source} has no label probability: only pairs of the embedded world have one."
            )
        total += max(row.probability, 1.0 - row.probability)
    return total / len(rows)


@functools.cache
def _token_ids() -> dict[str, int]:
    return {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *grammar.vocabulary()))}


def world_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, plus <pad>, <s>, </s>, <unk>; decoding gives back the text that was encoded."""
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(_token_ids()), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
