"""How happy a text sounds, by counting words of a small lexicon: a reward that needs no model; imports NumPy only.

It is as easy to please as it looks: a text of nothing but "happy" gets all there is. What a policy pays for it has to
be watched by other means, such as the perplexity of the model it came from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_POSITIVE = """
    beautiful best better brave bright calm cheer cheerful clever delicious enjoy enjoyed excited exciting fun
    funny gentle glad good great happily happiness happy help helped helpful hug hugged joy joyful kind
    kindness laugh laughed laughing love loved lovely loves lucky nice perfect play played playing pleased pretty
    proud safe sharing shiny smile smiled smiles smiling special strong sweet thank thanked thankful warm win
    wise won wonderful
"""
_NEGATIVE = """
    afraid alone angry ashamed awful bad badly bite bored broke broken cold cried cry crying cruel danger
    dangerous dark die died dirty fell fight fought frightened hate hated horrible hungry hurt ill jealous lonely
    lose lost mad mean mess messy naughty nervous noisy pain poor rude sad sadly scared scary scream screamed
    shout shouted sick sorry terrible tired ugly unhappy upset weak wet worried worse worst wrong yelled
"""
POSITIVE, NEGATIVE = frozenset(_POSITIVE.split()), frozenset(_NEGATIVE.split())
# Shorter texts are not paid for being short.
FEWEST_WORDS = 20
_WORD = re.compile(r"[a-z']+")


def sentiment_reward(texts: Sequence[str]) -> np.ndarray:
    """Positive less negative words for every ten words, of at least `FEWEST_WORDS`: float32 [B], from -10 to 10.

    Any text is valid; case does not matter, and neither do words that are not in the lexicon.

    >>> sentiment_reward(["She smiled and was happy .", "The SAD dog cried. He was not happy.", ""])
    array([ 1. , -0.5,  0. ], dtype=float32)
    """
    return np.array([_score(_WORD.findall(text.lower())) for text in texts], np.float32)


def _score(words: Sequence[str]) -> float:
    balance = sum((word in POSITIVE) - (word in NEGATIVE) for word in words)
    return 10.0 * balance / max(len(words), FEWEST_WORDS)
