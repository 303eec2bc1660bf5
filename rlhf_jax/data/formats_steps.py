"""What a record of process supervision means: solutions in steps with a label for each; imports rows and fields only.

A tree of continuations becomes one row for each path to its end. A step that several paths share is labelled in the
first of them alone, so that no judgement counts twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_jax.data import fields
from rlhf_jax.data.fields import BadRow
from rlhf_jax.data.formats import question_with_passages
from rlhf_jax.data.rows import ProcessSteps

# Math-Shepherd writes this after each step of "input", where "label" has + or -.
STEP_MARK = "ки"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Ratings of PRM800K: neutral (0) counts as right, as in Lightman et al. (2023), appendix F.
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0, None: None}

Path = list[tuple[str, float | None]]


def process_steps(record: Any, source: str) -> list[ProcessSteps]:
    """Solutions in steps, in one of the published formats.

    - TRL: ``prompt``, ``completions``, ``labels`` (true, false or a probability; null where nobody judged).
    - PRM800K: the steps that were chosen, and every rejected alternative after the steps before it.
    - Math-Shepherd: ``input`` with a mark after each step, ``label`` with + or - in its place.
    - Monte Carlo values, as a tree of ``children`` or as a list of ``solution_prefix``: ``mc_value`` is the label.
    - Fine-grained feedback: the sentences of ``prediction 1``, wrong where an error's span touches them.
    """
    record = fields.object_of(record)
    if "completions" in record:
        prompt, answer, paths = _of_trl(record)
    elif isinstance(record.get("question"), dict):
        prompt, answer, paths = _of_prm800k(record)
    elif isinstance(record.get("reasoning_steps"), dict):
        prompt, answer, paths = _of_tree(record)
    elif "reasoning_steps" in record:
        prompt, answer, paths = _of_prefixes(record)
    elif "feedback" in record:
        prompt, answer, paths = _of_feedback(record)
    else:
        prompt, answer, paths = _of_math_shepherd(record)
    paths = [path for path in paths if any(label is not None for _, label in path)]
    if not paths:
        raise BadRow("has no labelled step")
    return [
        ProcessSteps(
            prompt=prompt,
            steps=tuple(step for step, _ in path),
            labels=tuple(label for _, label in path),
            source=source if len(paths) == 1 else f"{source}/{number}",
            answer=answer,
            group=prompt,
        )
        for number, path in enumerate(paths, start=1)
    ]


def _of_trl(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    steps, labels = fields.list_of(record, "completions"), fields.list_of(record, "labels")
    if len(steps) != len(labels):
        raise BadRow(f"has {len(steps)} 'completions' and {len(labels)} 'labels', where each step needs one")
    path = [
        (fields.checked(step, "completions"), None if label is None else fields.probability(label, "labels"))
        for step, label in zip(steps, labels, strict=True)
    ]
    return fields.text(record, "prompt"), fields.optional_text(record, "answer"), [path]


def _of_prm800k(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    question = record["question"]
    steps = fields.list_of(fields.object_of(fields.value_of(record, "label")), "steps")
    chosen: Path = []
    others: list[Path] = []
    for step in steps:
        step = fields.object_of(step)
        rated = [_rated(completion) for completion in step.get("completions") or ()]
        place, human = step.get("chosen_completion"), step.get("human_completion")
        if place is not None and not (isinstance(place, int) and 0 <= place < len(rated)):
            raise BadRow(
                f"has 'chosen_completion' {place!r} where there are {len(rated)} completions to choose from"
            )
        before = [(text, None) for text, _ in chosen]
        others += [[*before, other] for number, other in enumerate(rated) if number != place]
        if place is not None:
            chosen.append(rated[place])
        elif human is not None:
            chosen.append(_rated(human))
        else:
            break
    return (
        fields.text(question, "problem"),
        fields.optional_text(question, "ground_truth_answer"),
        [chosen, *others],
    )


def _rated(completion: Any) -> tuple[str, float | None]:
    completion = fields.object_of(completion)
    rating = completion.get("rating")
    if rating not in _RATINGS or isinstance(rating, bool):
        raise BadRow(f"has {rating!r} in 'rating' where 1, 0, -1 or null is expected")
    return fields.text(completion, "text"), _RATINGS[rating]


def _of_tree(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    """The root is the question; every other node is a step."""
    root = record["reasoning_steps"]
    paths: list[Path] = []
    # (node, the steps before it, whether they are labelled here)
    waiting = [(child, []) for child in reversed(_children(root))]
    labelled: set[int] = set()
    while waiting:
        node, before = waiting.pop()
        node = fields.object_of(node)
        path = [*before, node]
        children = _children(node)
        if children:
            waiting += [(child, path) for child in reversed(children)]
            continue
        paths.append(
            [
                (
                    fields.text(step, "text"),
                    None if id(step) in labelled else fields.probability(step.get("mc_value"), "mc_value"),
                )
                for step in path
            ]
        )
        labelled |= {id(step) for step in path}
    return fields.text(record, "question"), fields.optional_text(record, "final_answer"), paths


def _children(node: Any) -> list[Any]:
    children = fields.object_of(node).get("children")
    if children is not None and not isinstance(children, list):
        raise BadRow(f"has {fields.kind_of(children)} in 'children' where a list is expected")
    return children or []


def _of_prefixes(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    """Each prefix of a solution has a value; a step is what it adds to the longest other prefix that begins it."""
    question = fields.text(record, "question")
    values: dict[str, float] = {}
    for entry in fields.list_of(record, "reasoning_steps"):
        entry = fields.object_of(entry)
        prefix = fields.text(entry, "solution_prefix")
        if not prefix.startswith(question):
            raise BadRow("has a 'solution_prefix' that does not begin with its 'question'")
        if prefix != question:
            values.setdefault(prefix, fields.probability(entry.get("mc_value"), "mc_value"))
    paths: list[Path] = []
    labelled: set[str] = set()
    for end in _longest(values):
        stations = sorted((prefix for prefix in values if end.startswith(prefix)), key=len)
        path = [
            (after[len(before) :], None if after in labelled else values[after])
            for before, after in zip([question, *stations], stations, strict=False)
        ]
        paths.append(path)
        labelled |= set(stations)
    return question, fields.optional_text(record, "final_answer"), paths


def _longest(prefixes: Sequence[str] | dict[str, float]) -> Iterator[str]:
    """Those that begin no other, in the order given."""
    following = sorted(prefixes)
    inner = {
        first
        for first, second in zip(following, following[1:], strict=False)
        if second.startswith(first) and second != first
    }
    return (prefix for prefix in prefixes if prefix not in inner)


def _of_math_shepherd(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    given, labelled = fields.text(record, "input"), fields.text(record, "label")
    parts = given.split(STEP_MARK)
    if len(parts) < 2 or parts[-1].strip():
        raise BadRow(f"has an 'input' that does not end in '{STEP_MARK}', the mark after each step")
    signs, place = [], 0
    for part in parts[:-1]:
        place += len(part)
        sign = labelled[place : place + 1]
        if not labelled.startswith(part, place - len(part)) or sign not in ("+", "-"):
            raise BadRow(f"has a 'label' that is not its 'input' with + or - for each '{STEP_MARK}'")
        signs.append(sign)
        place += 1
    start = parts[0].find("Step 1:")
    if start <= 0:
        raise BadRow("has an 'input' without a question before 'Step 1:'")
    question, texts = parts[0][:start].strip(), [parts[0][start:], *parts[1:-1]]
    path = [
        (fields.checked(text.strip(), "input"), float(sign == "+"))
        for text, sign in zip(texts, signs, strict=True)
    ]
    return fields.checked(question, "input"), "", [path]


def _of_feedback(record: dict[str, Any]) -> tuple[str, str, list[Path]]:
    text = fields.text(record, "prediction 1")
    errors = fields.object_of(record["feedback"]).get("errors") or []
    spans = []
    for error in errors:
        error = fields.object_of(error)
        if error.get("start") is None or error.get("end") is None:
            continue  # what is missing has no place in the text
        spans.append((fields.count(error, "start"), fields.count(error, "end")))
    path, start = [], 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        if text[start:end].strip():
            wrong = any(first < end and last > start for first, last in spans)
            path.append((text[start:end], float(not wrong)))
        start = end
    return question_with_passages(record), "", [path]
