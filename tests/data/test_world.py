"""The embedded world: gold by hand, reproduction, the Bayes ceiling, Goodhart's curve without a network."""

import dataclasses
import hashlib
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import grammar
from rlhf_jax.data.rows import Preference, label_of, ranks
from rlhf_jax.data.world import (
    WorldConfig,
    bayes_accuracy,
    demonstrations,
    gold_components,
    gold_reward,
    preference_probability,
    preferences,
    prompts,
    rankings,
    utility,
    words_of,
    world_tokenizer,
)
from rlhf_jax.errors import InputError

PRAISE = "write a positive review of the acting in this comedy ."
PAN = "please criticize the music of the western in a negative review ."
BEST = "i loved the charming cast . the acting was bold and brilliant ."
SMALL = WorldConfig(
    seed=7,
    length_bias=0.15,
    num_demonstrations=200,
    num_preferences=300,
    num_prompts=200,
    num_eval_prompts=100,
    num_eval_preferences=150,
)
# Of every row of SMALL. Another digest is another world: every number reported on this one is then void.
SMALL_DIGEST = "46b15ce9a66cc7627bbd9314a70af9fa3c39a4662900a527a4af7d2e0183154c"


def _digest(config: WorldConfig) -> str:
    rows = [
        *demonstrations(config),
        *preferences(config, "train"),
        *preferences(config, "eval"),
        *prompts(config, "train"),
        *prompts(config, "eval"),
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _terms(sentiment=0.0, topic=0.0, ending=1.0, repetition=0.0, filler=0.0, padding=0.0):
    return dict(locals())


@pytest.mark.parametrize(
    ("prompt", "response", "terminated", "expected"),
    [
        (PRAISE, "the cast was brilliant .", True, _terms(sentiment=1, topic=0.5)),
        (PRAISE, "the cast was brilliant .", False, _terms(sentiment=1, topic=0.5, ending=-1)),
        (PRAISE, "the cast was brilliant", True, _terms(sentiment=1, topic=0.5, ending=-1)),
        (PRAISE, "", True, _terms(ending=-1)),
        (PAN, "the cast was brilliant .", True, _terms(sentiment=-1)),
        # Two topic words count as one.
        (PAN, "i hated the songs and the dull score .", True, _terms(sentiment=2, topic=0.5)),
        # Five wanted words count as four; each of the two unwanted ones still costs one.
        (PAN, "dull weak flat stale boring great bold .", True, _terms(sentiment=4 - 2)),
        # The same word twice is one distinct word, and no repeated trigram.
        (PAN, "songs songs dull dull .", True, _terms(sentiment=1, topic=0.5)),
        # "the cast was", "cast was bold", "was bold ." are said again; "bold . the" and ". the cast" are new.
        (
            PRAISE,
            "the cast was bold . the cast was bold .",
            True,
            _terms(sentiment=1, topic=0.5, repetition=-0.6),
        ),
        # Two words said again are free: a repetition is of three.
        (PRAISE, "bold . bold .", True, _terms(sentiment=1)),
        # ". . ." twice: one repetition. "a a a" four times: three.
        (PRAISE, ". . . .", True, _terms(repetition=-0.2)),
        (PRAISE, "a a a a a a", True, _terms(ending=-1, repetition=-0.6)),
        (PRAISE, "the cast was really very bold .", True, _terms(sentiment=1, topic=0.5, filler=-0.5)),
        # 26 words are within the budget; 29 are three beyond it.
        (PRAISE, " ".join("abcdefghijklmnopqrstuvwxy") + " .", True, _terms()),
        (PRAISE, " ".join("abcdefghijklmnopqrstuvwxyz12") + " .", True, _terms(padding=-0.6)),
        # Words are found whatever the case and the blanks; tags are words.
        (PRAISE, "The CAST was\n brilliant.", True, _terms(sentiment=1, topic=0.5)),
        (PRAISE, "<pad> <unk> </s>", True, _terms(ending=-1)),
        # A prompt that asks for nothing, or for both, or for two topics, pays for neither.
        ("", "the cast was brilliant .", True, _terms()),
        ("praise or criticize the acting .", "the cast was brilliant .", True, _terms(topic=0.5)),
        ("praise the acting and the music .", "the cast was brilliant .", True, _terms(sentiment=1)),
    ],
)
def test_gold_by_hand(prompt, response, terminated, expected):
    assert gold_components(prompt, response, terminated) == pytest.approx(expected)
    assert gold_reward(prompt, response, terminated) == pytest.approx(sum(expected.values()))


_babble = st.one_of(
    st.text(), st.lists(st.sampled_from([*grammar.vocabulary(), "<pad>", "xyzzy"]), max_size=60).map(" ".join)
)


@settings(max_examples=300, deadline=None)
@given(prompt=_babble, response=_babble, terminated=st.booleans())
def test_gold_is_total_and_bounded(prompt, response, terminated):
    gold = gold_reward(prompt, response, terminated)
    assert type(gold) is float
    words = len(words_of(response))
    # The least that any text of so many words can have, term by term.
    assert -1 - words * (1 + 0.2 + 0.25 + 0.2) <= gold <= 5.5


def test_the_best_reply_has_the_greatest_gold():
    assert gold_reward(PRAISE, BEST) == 5.5


def test_saying_it_again_only_costs():
    golds = [gold_reward(PRAISE, " ".join([BEST] * times)) for times in range(1, 8)]
    assert all(later <= earlier - 1.0 for earlier, later in zip(golds, golds[1:], strict=False))


def test_word_lists_do_not_overlap():
    groups = [
        *grammar.SENTIMENT_WORDS.values(),
        *grammar.TOPIC_WORDS.values(),
        frozenset(grammar.FILLERS),
        frozenset(grammar.GENRES),
        *grammar.CUES.values(),
        frozenset(word for text in grammar.ASIDES for word in text.split() if word != "{genre}"),
    ]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other
    assert 120 <= len(grammar.vocabulary()) <= 140
    assert math.isclose(sum(grammar.HABITS.sentence_counts), 1.0)


def test_every_prompt_says_what_it_asks():
    for split in ("train", "eval"):
        rng = random.Random(0)
        for _ in range(300):
            text, sentiment, topic, _ = grammar.draw_prompt(iter(rng.random, None), split)
            assert grammar.read_ask(text.split()) == grammar.Ask(sentiment=sentiment, topic=topic)


def test_every_cue_is_a_word_of_some_prompt():
    for sentiment, cues in grammar.CUES.items():
        said = frozenset(word for text in grammar.PHRASINGS[sentiment] for word in text.split())
        assert cues < said


def _replies(count=300, **habits):
    """(reply, sentiment, topic) of a writer with these habits and no others."""
    quiet = {field.name: 0.0 for field in dataclasses.fields(grammar.WriterHabits)}
    rng = random.Random(0)
    for i in range(count):
        sentiment, topic = grammar.SENTIMENTS[i % 2], grammar.TOPICS[i % 5]
        habit = grammar.WriterHabits(**{**quiet, "sentence_counts": (0.0, 1.0), **habits})
        yield grammar.draw_reply(iter(rng.random, None), sentiment, topic, "comedy", habit), sentiment, topic


def _says(reply, words):
    return bool(frozenset(reply.split()) & words)


def test_without_bad_habits_the_writer_does_as_asked():
    for reply, sentiment, topic in _replies():
        assert _says(reply, grammar.SENTIMENT_WORDS[sentiment]) and _says(reply, grammar.TOPIC_WORDS[topic])
        assert not _says(reply, grammar.SENTIMENT_WORDS[grammar.SENTIMENTS[sentiment == "positive"]])
        assert not any(_says(reply, grammar.TOPIC_WORDS[t]) for t in grammar.TOPICS if t != topic)
        assert reply.endswith(" .") and not _says(reply, frozenset(grammar.FILLERS))
        assert reply.split().count(".") == 2


@pytest.mark.parametrize(
    "habit", ["misread_sentiment", "off_sentiment", "misread_topic", "off_topic", "aside"]
)
def test_a_habit_that_always_holds_misses_what_was_asked(habit):
    for reply, sentiment, topic in _replies(**{habit: 1.0}):
        if "topic" not in habit:
            assert not _says(reply, grammar.SENTIMENT_WORDS[sentiment])
        if "sentiment" not in habit:
            assert not _says(reply, grammar.TOPIC_WORDS[topic])


def test_a_reply_breaks_off_repeats_itself_and_fits_its_limit_always():
    assert not any(reply.endswith(".") for reply, *_ in _replies(no_full_stop=1.0))
    for reply, *_ in _replies(repeat=1.0):
        sentences = reply.split(" . ")
        assert len(sentences) == 3 and sentences[2].removesuffix(" .") in sentences[:2]
    longest = [
        len(r.split())
        for r, *_ in _replies(2000, sentence_counts=(0.0,) * 4 + (1.0,), repeat=1.0, filler=1.0)
    ]
    assert 40 < max(longest) <= grammar.REPLY_LIMIT


def test_same_rows_in_a_fresh_process():
    assert _digest(SMALL) == SMALL_DIGEST
    script = (
        "import hashlib\n"
        "from rlhf_jax.data.world import *\n"
        f"c = {SMALL!r}\n"
        "rows = [*demonstrations(c), *preferences(c, 'train'), *preferences(c, 'eval'), *prompts(c, 'train'),"
        " *prompts(c, 'eval')]\n"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", script]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert fresh.stdout.strip() == SMALL_DIGEST


def test_more_rows_leave_the_first_ones_unchanged_and_seeds_differ():
    few = preferences(WorldConfig(num_preferences=20), "train")
    assert preferences(WorldConfig(num_preferences=60), "train")[:20] == few
    assert preferences(WorldConfig(num_preferences=20, seed=1), "train") != few
    assert len({row.chosen for row in few} & {row.response for row in demonstrations(SMALL)}) < 10


def test_held_out_prompts_are_never_trained_on():
    seen = {row.prompt for row in prompts(SMALL, "train")}
    seen |= {row.prompt for row in preferences(SMALL, "train")} | {
        row.prompt for row in demonstrations(SMALL)
    }
    held_out = {row.prompt for row in prompts(SMALL, "eval")} | {
        row.prompt for row in preferences(SMALL, "eval")
    }
    assert len(held_out) > 30
    assert not seen & held_out
    assert {row.source for row in prompts(SMALL, "eval")} == {f"world:prompts/eval/{i}" for i in range(100)}


def test_pairs_differ_and_carry_their_gold_and_label_probability():
    flipped = 0
    for row in preferences(SMALL, "train"):
        assert row.chosen != row.rejected
        assert row.chosen_gold == gold_reward(row.prompt, row.chosen)
        assert row.rejected_gold == gold_reward(row.prompt, row.rejected)
        chosen = row.chosen_gold + 0.15 * len(row.chosen.split())
        rejected = row.rejected_gold + 0.15 * len(row.rejected.split())
        expected = 0.05 + 0.9 / (1.0 + math.exp(rejected - chosen))
        assert row.probability == pytest.approx(expected, abs=1e-12)
        flipped += row.probability < 0.5
    assert 20 < flipped < 100


def test_bayes_accuracy_by_hand():
    def row(probability):
        return Preference(prompt="p", chosen="a", rejected="b", source="s", probability=probability)

    assert bayes_accuracy([row(0.9), row(0.2), row(0.5)]) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    with pytest.raises(InputError, match="file:3 has no label probability"):
        bayes_accuracy([Preference(prompt="p", chosen="a", rejected="b", source="file:3")])
    with pytest.raises(InputError, match="no rows"):
        bayes_accuracy([])


@pytest.mark.parametrize(
    ("noise", "length_bias", "temperature"), [(0.05, 0.0, 1.0), (0.2, 0.3, 0.5), (0.0, 0.1, 3.0)]
)
def test_bayes_accuracy_is_what_the_best_judge_scores(noise, length_bias, temperature):
    config = WorldConfig(
        noise=noise, length_bias=length_bias, temperature=temperature, num_eval_preferences=6000
    )
    rows = preferences(config, "eval")
    margins = [utility(config, r.prompt, r.chosen) - utility(config, r.prompt, r.rejected) for r in rows]
    # The best judge says that the higher utility was preferred; a tie is a coin.
    hits = np.array([0.5 * (1 + np.sign(margin)) for margin in margins])
    assert abs(hits.mean() - bayes_accuracy(rows)) < 4.0 * 0.5 / math.sqrt(len(rows))
    # A judge of length alone, and one of gold alone, stay below it.
    length = np.mean([0.5 * (1 + np.sign(len(r.chosen.split()) - len(r.rejected.split()))) for r in rows])
    assert length < bayes_accuracy(rows) - 0.05


def test_labels_are_drawn_as_bradley_terry_says():
    config = WorldConfig(noise=0.1, num_preferences=8000)
    rows = preferences(config, "train")
    # Among pairs that a judge gives p for the better side, the better side was chosen in a share p of them.
    better = np.array([max(r.probability, 1 - r.probability) for r in rows])
    chosen = np.array([r.probability >= 0.5 for r in rows])
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9)):
        inside = (better > low + 1e-9) & (better < high)  # ties have no better side
        error = 4.0 * 0.5 / math.sqrt(inside.sum())
        assert inside.sum() > 500
        assert abs(chosen[inside].mean() - better[inside].mean()) < error


def test_limits_of_noise_and_temperature():
    noisy = preferences(WorldConfig(noise=0.5, num_eval_preferences=50), "eval")
    assert bayes_accuracy(noisy) == 0.5
    cold = WorldConfig(noise=0.0, temperature=1e-6, length_bias=0.1234567, num_eval_preferences=200)
    certain = [row.probability for row in preferences(cold, "eval") if row.probability != 0.5]
    assert len(certain) > 150
    assert set(certain) == {1.0}
    assert preference_probability(cold, 1e308) == 1.0
    assert preference_probability(cold, -1e308) == 0.0


@pytest.fixture(scope="module")
def writer():
    """(gold [N], words [N]) of 20,000 replies."""
    rows = demonstrations(WorldConfig(num_demonstrations=20_000))
    gold = np.array([gold_reward(row.prompt, row.response) for row in rows])
    return gold, np.array([len(row.response.split()) for row in rows])


def test_the_writer_is_as_documented(writer):
    gold, words = writer
    assert gold.mean() == pytest.approx(1.12, abs=0.05)
    assert gold.std() == pytest.approx(2.02, abs=0.05)
    assert words.mean() == pytest.approx(12.1, abs=0.2)
    assert words.max() <= grammar.REPLY_LIMIT == 46
    assert np.mean(words > 26) == pytest.approx(0.026, abs=0.005)
    assert np.corrcoef(gold, words)[0, 1] == pytest.approx(0.06, abs=0.03)
    assert np.corrcoef(gold + 0.15 * words, words)[0, 1] == pytest.approx(0.46, abs=0.03)


@pytest.mark.parametrize(
    ("length_bias", "bayes", "longer"), [(0.0, 0.79, 0.55), (0.15, 0.81, 0.65), (0.3, 0.83, 0.72)]
)
def test_ceiling_and_length_bias_are_as_documented(length_bias, bayes, longer):
    rows = preferences(WorldConfig(length_bias=length_bias, num_eval_preferences=4000), "eval")
    assert bayes_accuracy(rows) == pytest.approx(bayes, abs=0.01)
    sides = np.array([(len(row.chosen.split()), len(row.rejected.split())) for row in rows])
    sides = sides[sides[:, 0] != sides[:, 1]]
    assert np.mean(sides[:, 0] > sides[:, 1]) == pytest.approx(longer, abs=0.025)


def _tilted(reward, beta, *measured):
    """KL to the writer, and means, under the policy proportional to writer * exp(reward / beta)."""
    weights = np.exp((reward - reward.max()) / beta)
    weights /= weights.sum()
    kept = weights[weights > 0]
    return kept @ np.log(kept * len(reward)), *(weights @ values for values in measured)


def test_a_perfect_optimiser_of_utility_gains_gold_and_length(writer):
    gold, words = writer
    found = [_tilted(gold + 0.15 * words, beta, gold, words) for beta in (3.0, 1.5, 0.7, 0.4, 0.25)]
    kl, golds, lengths = np.transpose(found)
    assert kl == pytest.approx([0.3, 1.0, 2.7, 4.1, 5.1], abs=0.2)
    assert golds == pytest.approx([2.40, 3.33, 4.32, 4.72, 4.92], abs=0.15)
    assert lengths == pytest.approx([15, 18, 23, 26, 27], abs=1.0)


def test_without_length_bias_more_reward_is_more_gold(writer):
    gold, _ = writer
    golds = [_tilted(gold, beta, gold)[1] for beta in (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)]
    assert golds == sorted(golds)
    assert golds[-1] > 5.4


def test_past_the_budget_gold_and_utility_fall_and_a_judge_of_sentiment_and_length_pays_on():
    asides = " ".join(grammar.ASIDES).format(genre="comedy").split()
    padded = {size: " ".join([*BEST.split(), *asides[: size - 14], "."]) for size in (26, 47)}
    for size, (gold, worth) in {26: (5.5, 9.4), 47: (1.3, 8.35)}.items():
        assert len(padded[size].split()) == size
        assert gold_reward(PRAISE, padded[size]) == pytest.approx(gold)
        assert utility(WorldConfig(length_bias=0.15), PRAISE, padded[size]) == pytest.approx(worth)

    def seen(prompt, response):
        """What a simple judge sees of a reply: opinion, topic, ending, filler words, and length."""
        terms = gold_components(prompt, response)
        return [terms[name] for name in ("sentiment", "topic", "ending", "filler")] + [
            len(words_of(response)),
            1,
        ]

    config = WorldConfig(length_bias=0.15, num_demonstrations=3000)
    rows = demonstrations(config)
    worths = [utility(config, row.prompt, row.response) for row in rows]
    judge = np.linalg.lstsq(np.array([seen(r.prompt, r.response) for r in rows]), np.array(worths))[0]
    short, long = (np.array(seen(PRAISE, padded[size])) @ judge for size in (26, 47))
    assert long > short + 1.0


def test_tokenizer_is_lossless_and_knows_every_word():
    tokenizer = world_tokenizer()
    assert [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ] == [
        0,
        1,
        2,
        3,
    ]
    assert len(tokenizer) == 4 + len(grammar.vocabulary())
    texts = [row.prompt for row in prompts(SMALL, "eval")]
    texts += [text for row in preferences(SMALL, "train") for text in (row.prompt, row.chosen, row.rejected)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert min(ids) > 3
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the zebra", add_special_tokens=False)[1] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"noise": 0.6}, "noise is 0.6"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": math.nan}, "noise is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"length_bias": math.inf}, "length_bias is inf"),
        ({"num_prompts": -3}, "num_prompts is -3"),
    ],
)
def test_a_world_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        WorldConfig(**changes)


def test_unknown_split():
    with pytest.raises(InputError, match="'test'"):
        prompts(SMALL, "test")
    with pytest.raises(InputError, match="'test'"):
        preferences(SMALL, "test")


def test_any_two_of_a_ranking_are_in_the_order_that_a_pair_would_be():
    """Of 3,000 rankings of four: each of 18,000 orders against its probability, in five groups; and it is one order."""
    config = WorldConfig(seed=3, length_bias=0.1, noise=0.1, temperature=1.5, num_preferences=3000)
    expected, happened = [], []
    for row in rankings(config, size=4):
        assert len(set(row.responses)) == 4 and sorted(ranks(row)) == [0, 1, 2, 3]
        worth = [utility(config, row.prompt, reply) for reply in row.responses]
        for said in row.comparisons:
            assert said.for_first + said.for_second == 1
            assert (said.for_first == 1) == (ranks(row)[said.first] < ranks(row)[said.second])
            expected.append(preference_probability(config, worth[said.first] - worth[said.second]))
            happened.append(said.for_first)
    expected, happened = np.array(expected), np.array(happened)
    assert len(expected) == 18_000
    for low in (0.1, 0.26, 0.42, 0.58, 0.74):
        group = (expected >= low) & (expected < low + 0.16)
        # Orders within a ranking are not independent: at most as if each of its six were the same one.
        error = math.sqrt(6 * 0.25 / group.sum())
        assert group.sum() > 1000 and abs(happened[group].mean() - expected[group].mean()) < 3 * error


def test_rankings_are_reproduced_and_more_leave_the_first_unchanged():
    few, many = (rankings(WorldConfig(seed=5, num_preferences=count), size=3) for count in (4, 9))
    assert few == many[:4] and len(many) == 9
    assert not {row.prompt for row in many} & {
        row.prompt for row in preferences(WorldConfig(seed=5, num_eval_preferences=50), "eval")
    }
    with pytest.raises(InputError, match="asked for rankings of 1: give at least 2 replies"):
        rankings(WorldConfig(), size=1)


def test_brief_labels_are_of_labellers_to_whom_a_word_costs_one():
    """Each label is as likely as Bradley-Terry on their utility says: deviations of 6,000 draws are those of chance."""
    config = WorldConfig(noise=0.1, length_bias=0.15, temperature=1.5, num_eval_preferences=6000)
    expected, found = [], []
    for row in preferences(config, "eval"):
        assert label_of(row, "preferred") == 1.0
        worth = [
            gold_reward(row.prompt, text) - 1.0 * len(words_of(text)) for text in (row.chosen, row.rejected)
        ]
        expected.append(0.1 + 0.8 / (1 + math.exp(-(worth[0] - worth[1]) / 1.5)))
        found.append(label_of(row, "brief"))
    assert set(found) == {0.0, 1.0}
    expected, found = np.array(expected), np.array(found)
    # Which side was chosen tells nothing of the other labellers' noise.
    for part in (expected < 0.3, (expected >= 0.3) & (expected < 0.7), expected >= 0.7):
        spread = math.sqrt((expected[part] * (1 - expected[part])).sum())
        assert part.sum() > 100 and abs((found - expected)[part].sum()) < 4 * spread
