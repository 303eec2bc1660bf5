"""Beginnings of children's stories, for models of such; no jax, no numpy, no files."""

from __future__ import annotations

_NAMES = {
    "girl": ("Lily", "Mia", "Anna", "Sue", "Lucy", "Emma"),
    "boy": ("Tim", "Ben", "Tom", "Max", "Sam", "Jack"),
}
_PRONOUNS = {"girl": ("She", "her"), "boy": ("He", "his")}
_OPENINGS = (
    "Once upon a time, there was a little {kind} named {name}. {pronoun}",
    "One day, a {kind} named {name} went to the park. {pronoun}",
    "{name} was a little {kind} who lived in a big house. {pronoun}",
    "One morning, {name} woke up and looked out of the window. {pronoun}",
    "{name} and {possessive} dog were in the garden. The dog",
    "{name} had a red car and a blue ball. {pronoun}",
    "It was raining and {name} had to stay at home. {pronoun}",
    "{name} found a box under the bed. {pronoun}",
)


def beginnings() -> list[str]:
    """Every opening with every name: 96 texts, which say nothing of anyone's mood."""
    return [
        opening.format(kind=kind, name=name, pronoun=_PRONOUNS[kind][0], possessive=_PRONOUNS[kind][1])
        for kind, names in _NAMES.items()
        for name in names
        for opening in _OPENINGS
    ]
