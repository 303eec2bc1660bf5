"""The English of the embedded world: words, prompts, and the writer who answers them; imports nothing.

Everything is a pure function of a ``draw``, an endless iterator of uniforms in [0, 1). Words and full stops
are separated by single blanks, all in lower case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Draw = Iterator[float]

SENTIMENTS = ("positive", "negative")
POSITIVE_ADJECTIVES = ("brilliant", "charming", "fresh", "clever", "great", "warm", "bold", "superb")
NEGATIVE_ADJECTIVES = ("dull", "weak", "flat", "stale", "cheap", "boring", "clumsy", "hollow")
POSITIVE_VERBS = ("loved", "enjoyed", "admired")
NEGATIVE_VERBS = ("hated", "disliked", "regretted")
ADJECTIVES = {"positive": POSITIVE_ADJECTIVES, "negative": NEGATIVE_ADJECTIVES}
VERBS = {"positive": POSITIVE_VERBS, "negative": NEGATIVE_VERBS}
SENTIMENT_WORDS = {s: frozenset(ADJECTIVES[s] + VERBS[s]) for s in SENTIMENTS}

TOPIC_NOUNS = {
    "acting": ("acting", "cast", "actors"),
    "story": ("story", "plot", "twists"),
    "music": ("music", "songs", "score"),
    "effects": ("effects", "stunts", "monsters"),
    "dialogue": ("dialogue", "jokes", "speeches"),
}
TOPICS = tuple(TOPIC_NOUNS)
TOPIC_WORDS = {topic: frozenset(nouns) for topic, nouns in TOPIC_NOUNS.items()}
PLURALS = frozenset(
    (
        "actors",
        "twists",
        "songs",
        "effects",
        "stunts",
        "monsters",
        "jokes",
        "speeches",
    )
)
# More people ask for praise. With equal shares no word is better than another on average, and a reward model
# starts on a saddle (an exclusive or of prompt and reply) that takes it many thousands of pairs to leave.
POSITIVE_SHARE = 0.75
GENRES = ("comedy", "drama", "thriller", "western", "musical", "romance", "mystery", "documentary")
FILLERS = ("really", "very", "basically", "just", "quite", "totally", "so", "actually")

# The words that tell a prompt's sentiment. Every phrasing has "positive" or "negative": one frequent cue is learned in
# hundreds of steps, four rare ones in thousands.
CUES = {
    "positive": frozenset(("positive", "praise", "recommend")),
    "negative": frozenset(("negative", "criticize", "pan")),
}
PHRASINGS = {
    "positive": (
        "write a positive review of the {topic} in this {genre} .",
        "tell me what is positive about the {topic} of this {genre} .",
        "please praise the {topic} of the {genre} in a positive review .",
        "give a positive reason to recommend the {topic} in the {genre} .",
    ),
    "negative": (
        "write a negative review of the {topic} in this {genre} .",
        "tell me what is negative about the {topic} of this {genre} .",
        "please criticize the {topic} of the {genre} in a negative review .",
        "give a negative reason to pan the {topic} in the {genre} .",
    ),
}
OPINIONS = (
    "the {noun} {was} {adjective} .",
    "the {noun} {was} {adjective} and {adjective2} .",
    "i {verb} the {noun} .",
    "i {verb} the {adjective} {noun} .",
    "the {noun} felt {adjective} to me .",
    "the {noun} of this {genre} {was} {adjective} .",
    "i found the {noun} {adjective} .",
    "the {noun} and the {noun2} were {adjective} .",
    "we {verb} the {noun} and the {noun2} .",
)
ASIDES = (
    "my family saw it on friday night .",
    "that film runs for two hours .",
    "we watched it at home last week .",
    "it opened here in early spring .",
    "a friend bought our tickets .",
    "there is always a long line outside .",
    "you can see it this weekend .",
    "they made that {genre} in one month .",
    "people talked about it after dinner .",
    "it comes from an old book .",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a prompt asks for; None where it cannot be told."""

    sentiment: str | None
    topic: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterHabits:
    """How often the writer does what; every habit costs gold, so imitation leaves room for improvement."""

    sentence_counts: tuple[float, ...] = (0.45, 0.40, 0.12, 0.02, 0.01)  # P(1), ..., P(5) sentences
    misread_sentiment: float = 0.25  # the whole reply is of the opposite opinion
    misread_topic: float = 0.15  # the whole reply is about something else
    off_sentiment: float = 0.05  # a sentence against the rest of the reply
    off_topic: float = 0.1  # a sentence beside the topic of the rest
    aside: float = 0.15  # a sentence of no opinion at all
    filler: float = 0.35  # before an adjective or a verb
    repeat: float = 0.02  # one sentence of the reply is said twice
    no_full_stop: float = 0.4  # the reply breaks off before its last full stop


HABITS = WriterHabits()
REPLY_LIMIT = 46  # words, full stops included: with the end of sequence, a reply fits 48 tokens


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of ``options``, uniformly."""
    return options[int(next(draw) * len(options))]


def vocabulary() -> tuple[str, ...]:
    """Every word that a prompt or a reply can contain, sorted."""
    texts = [*PHRASINGS["positive"], *PHRASINGS["negative"], *OPINIONS, *ASIDES, "was were"]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    for group in (*SENTIMENT_WORDS.values(), *TOPIC_WORDS.values(), GENRES, FILLERS):
        words.update(group)
    return tuple(sorted(words))


def held_out_setting(topic: str, genre: str) -> bool:
    """Whether this pairing is kept for evaluation: one genre of the eight for every topic, each another."""
    return (TOPICS.index(topic) + GENRES.index(genre)) % len(GENRES) == 0


SETTINGS = {
    split: tuple((t, g) for t in TOPICS for g in GENRES if held_out_setting(t, g) == (split == "eval"))
    for split in ("train", "eval")
}


def draw_prompt(draw: Draw, split: str) -> tuple[str, str, str, str]:
    """A prompt of the split ("train" or "eval", which share no prompt), its sentiment, topic and genre."""
    sentiment = SENTIMENTS[0] if next(draw) < POSITIVE_SHARE else SENTIMENTS[1]
    topic, genre = pick(draw, SETTINGS[split])
    text = pick(draw, PHRASINGS[sentiment]).format(topic=topic, genre=genre)
    return text, sentiment, topic, genre


def read_ask(prompt_words: Sequence[str]) -> Ask:
    """The sentiment and topic that a prompt names; naming both sentiments, or two topics, names none."""
    words = frozenset(prompt_words)
    sentiments = [s for s in SENTIMENTS if words & CUES[s]]
    topics = [t for t in TOPICS if t in words]
    return Ask(
        sentiment=sentiments[0] if len(sentiments) == 1 else None,
        topic=topics[0] if len(topics) == 1 else None,
    )


def _opposite(sentiment: str) -> str:
    return SENTIMENTS[1 - SENTIMENTS.index(sentiment)]


def _another_topic(draw: Draw, topic: str) -> str:
    return TOPICS[(TOPICS.index(topic) + 1 + int(next(draw) * (len(TOPICS) - 1))) % len(TOPICS)]


def _two(draw: Draw, options: Sequence[str]) -> tuple[str, str]:
    first = int(next(draw) * len(options))
    second = (first + 1 + int(next(draw) * (len(options) - 1))) % len(options)
    return options[first], options[second]


def draw_sentence(draw: Draw, sentiment: str, topic: str, genre: str, habits: WriterHabits = HABITS) -> str:
    """One sentence of the writer: an opinion, perhaps the wrong one or beside the topic, or an aside."""
    if next(draw) < habits.aside:
        return pick(draw, ASIDES).format(genre=genre)
    said = _opposite(sentiment) if next(draw) < habits.off_sentiment else sentiment
    about = _another_topic(draw, topic) if next(draw) < habits.off_topic else topic
    noun, noun2 = _two(draw, TOPIC_NOUNS[about])
    adjective, adjective2 = _two(draw, ADJECTIVES[said])
    verb = pick(draw, VERBS[said])
    if next(draw) < habits.filler:
        adjective = f"{pick(draw, FILLERS)} {adjective}"
        verb = f"{pick(draw, FILLERS)} {verb}"
    return pick(draw, OPINIONS).format(
        noun=noun,
        noun2=noun2,
        was="were" if noun in PLURALS else "was",
        adjective=adjective,
        adjective2=adjective2,
        verb=verb,
        genre=genre,
    )


def draw_reply(draw: Draw, sentiment: str, topic: str, genre: str, habits: WriterHabits = HABITS) -> str:
    """A reply of one to five sentences, or one more when a sentence is repeated; never over `REPLY_LIMIT`."""
    count, threshold = 1, next(draw)
    for probability in habits.sentence_counts[:-1]:
        threshold -= probability
        if threshold < 0:
            break
        count += 1
    if next(draw) < habits.misread_sentiment:
        sentiment = _opposite(sentiment)
    if next(draw) < habits.misread_topic:
        topic = _another_topic(draw, topic)
    sentences = [draw_sentence(draw, sentiment, topic, genre, habits) for _ in range(count)]
    if next(draw) < habits.repeat:
        sentences.append(pick(draw, sentences))
    while sum(len(sentence.split()) for sentence in sentences) > REPLY_LIMIT:
        sentences.pop()
    reply = " ".join(sentences)
    return reply.removesuffix(" .") if next(draw) < habits.no_full_stop else reply
