"""TensorFlow Datasets builders, one a kind of row, that write array records without TensorFlow; imports rows and TFDS.

Each builder is given its rows and writes them, in their order, as the split "train"; what it wrote is read with any
version of TFDS by ``tfds.builder_from_directory(path).as_data_source("train")``. TFDS finds builders by their class and
asks for subclasses: the one place in this project that inherits. Floats are stored as float32, None as NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import formats, formats_steps
from rlhf_jax.data.readers import ToRows
from rlhf_jax.data.rows import (
    Comparison,
    Demonstration,
    Preference,
    ProcessSteps,
    Prompt,
    Ranking,
    Row,
    Unpaired,
)

VERSION = "1.0.0"
SPLIT = "train"
_NO_VOTES: list[int] = []

_TEXT = tfds.features.Text
_MESSAGES = {"role": _TEXT(), "content": _TEXT()}
_LABEL = {"objective": _TEXT(), "probability": np.float32}
_COMPARISON = {field.name: np.int32 for field in dataclasses.fields(Comparison)}


def _features(**own: Any) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({"source": _TEXT(), "group": _TEXT(), "prompt": _TEXT(), **own})


def _conversation() -> dict[str, Any]:
    return {"messages": tfds.features.Sequence(_MESSAGES)}


def _info(builder: tfds.core.DatasetBuilder, description: str, features: Any) -> tfds.core.DatasetInfo:
    # Rows keep their order, so that groups, lengths and error messages of row i are found without reading it.
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features, disable_shuffling=True
    )


def _examples(rows: Iterable[Row], encode: Callable[[Any], dict]) -> Iterator[tuple[int, dict]]:
    for number, row in enumerate(rows):
        yield number, encode(row)


class Demonstrations(tfds.core.GeneratorBasedBuilder):
    """Prompts with one response each."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[Demonstration] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self.__doc__, _features(response=_TEXT(), **_conversation()))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _plain)


class Preferences(tfds.core.GeneratorBasedBuilder):
    """Prompts with a chosen and a rejected response, annotators' votes (for either, and for neither) and labels."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[Preference] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(
            self,
            self.__doc__,
            _features(
                chosen=_TEXT(),
                rejected=_TEXT(),
                votes=tfds.features.Sequence(np.int32),
                labels=tfds.features.Sequence(_LABEL),
                probability=np.float32,
                chosen_gold=np.float32,
                rejected_gold=np.float32,
                **_conversation(),
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _preference)


class Rankings(tfds.core.GeneratorBasedBuilder):
    """Prompts with K responses, and annotators' votes on pairs of them."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[Ranking] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(
            self,
            self.__doc__,
            _features(
                responses=tfds.features.Sequence(_TEXT()),
                comparisons=tfds.features.Sequence(_COMPARISON),
                **_conversation(),
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _ranking)


class Prompts(tfds.core.GeneratorBasedBuilder):
    """Prompts, with the answer that a verifier holds responses to."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[Prompt] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self.__doc__, _features(answer=_TEXT(), **_conversation()))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _plain)


class Steps(tfds.core.GeneratorBasedBuilder):
    """Solutions in steps, each with the probability that it is right, NaN where nobody judged it."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[ProcessSteps] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(
            self,
            self.__doc__,
            _features(
                answer=_TEXT(),
                steps=tfds.features.Sequence(_TEXT()),
                labels=tfds.features.Sequence(np.float32),
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _steps)


class Unpaireds(tfds.core.GeneratorBasedBuilder):
    """Responses by themselves, each desirable or not."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, rows: Iterable[Unpaired] = (), **given: Any):
        self._rows = rows
        super().__init__(**given)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self.__doc__, _features(response=_TEXT(), desirable=np.bool_, **_conversation()))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        return _examples(self._rows, _plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of row: how files give it, what it is written as, and how it is read back."""

    to_rows: ToRows
    builder: Callable[..., tfds.core.DatasetBuilder]
    encode: Callable[[Any], dict[str, Any]]
    decode: Callable[[Mapping[str, Any]], Row]


def _plain(row: Any) -> dict[str, Any]:
    """The fields as they are, but for messages."""
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if "messages" in fields:
        fields["messages"] = [{"role": role, "content": content} for role, content in row.messages]
    return fields


def _preference(row: Preference) -> dict[str, Any]:
    numbers = {name: _nan(getattr(row, name)) for name in ("probability", "chosen_gold", "rejected_gold")}
    fields = {**_plain(row), **numbers, "votes": _NO_VOTES if row.votes is None else list(row.votes)}
    fields["labels"] = [dict(zip(_LABEL, label, strict=True)) for label in row.labels]
    del fields["target"], fields["objectives"]  # choices of whoever trains
    return fields


def _ranking(row: Ranking) -> dict[str, Any]:
    comparisons = [dataclasses.asdict(comparison) for comparison in row.comparisons]
    fields = {**_plain(row), "responses": list(row.responses), "comparisons": comparisons}
    del fields["targets"]  # as of a preference
    return fields


def _steps(row: ProcessSteps) -> dict[str, Any]:
    return {**_plain(row), "steps": list(row.steps), "labels": [_nan(label) for label in row.labels]}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _none(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def _shared(example: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are texts or messages."""
    found = {name: value.decode() for name, value in example.items() if isinstance(value, bytes)}
    if "messages" in example:
        turns = example["messages"]
        found["messages"] = tuple(
            (role.decode(), content.decode())
            for role, content in zip(turns["role"], turns["content"], strict=True)
        )
    return found


def _decode_preference(example: Mapping[str, Any]) -> Preference:
    votes = tuple(int(count) for count in example["votes"]) or None
    numbers = {name: _none(example[name]) for name in ("probability", "chosen_gold", "rejected_gold")}
    # A set that was prepared before pairs had them has none.
    given = example.get("labels", dict.fromkeys(_LABEL, ()))
    sides = zip(*(given[name] for name in _LABEL), strict=True)
    labels = tuple((name.decode(), float(likely)) for name, likely in sides)
    return Preference(**_shared(example), **numbers, votes=votes, labels=labels)


def _decode_ranking(example: Mapping[str, Any]) -> Ranking:
    counts = example["comparisons"]
    names = list(_COMPARISON)
    comparisons = tuple(
        Comparison(**dict(zip(names, map(int, values), strict=True)))
        for values in zip(*(counts[name] for name in names), strict=True)
    )
    responses = tuple(response.decode() for response in example["responses"])
    return Ranking(**_shared(example), responses=responses, comparisons=comparisons)


def _decode_steps(example: Mapping[str, Any]) -> ProcessSteps:
    steps = tuple(step.decode() for step in example["steps"])
    return ProcessSteps(**_shared(example), steps=steps, labels=tuple(map(_none, example["labels"])))


def _decode_unpaired(example: Mapping[str, Any]) -> Unpaired:
    return Unpaired(**_shared(example), desirable=bool(example["desirable"]))


def _decode_demonstration(example: Mapping[str, Any]) -> Demonstration:
    return Demonstration(**_shared(example))


def _decode_prompt(example: Mapping[str, Any]) -> Prompt:
    return Prompt(**_shared(example))


KINDS: Mapping[str, Kind] = {
    "demonstrations": Kind(
        to_rows=formats.demonstrations, builder=Demonstrations, encode=_plain, decode=_decode_demonstration
    ),
    "preferences": Kind(
        to_rows=formats.preferences, builder=Preferences, encode=_preference, decode=_decode_preference
    ),
    "rankings": Kind(to_rows=formats.rankings, builder=Rankings, encode=_ranking, decode=_decode_ranking),
    "prompts": Kind(to_rows=formats.prompts, builder=Prompts, encode=_plain, decode=_decode_prompt),
    "steps": Kind(to_rows=formats_steps.process_steps, builder=Steps, encode=_steps, decode=_decode_steps),
    "unpaired": Kind(to_rows=formats.unpaired, builder=Unpaireds, encode=_plain, decode=_decode_unpaired),
}
