"""What a record means: from named fields to rows of one kind; imports rows and fields only.

Each function takes a record and its source and gives the rows that it makes, told apart by the fields it has, or raises
`BadRow`. Besides the formats named at each function, all read TRL's conventions: ``prompt``, ``completion``,
``chosen``, ``rejected``, ``label``, ``messages``, as texts or as lists of messages.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.data import fields
from rlhf_jax.data.fields import BadRow
from rlhf_jax.data.rows import Comparison, Demonstration, Messages, Preference, Prompt, Ranking, Unpaired
from rlhf_jax.data.rows import pairs as pairs_of
from rlhf_jax.data.rows import plain_text as plain

ASSISTANT_TURN = "\n\nAssistant:"
_RESPONSE_FIELDS = ("response", "completion", "output")
_CONTEXT_FIELDS = ("context", "input")
_ANSWER_FIELDS = ("answer", "solution", "ground_truth", "final_answer", "ground_truth_answer")


def demonstrations(record: Any, source: str) -> list[Demonstration]:
    """Prompt and response, instruction rows (with ``context`` or ``input``), ``instances``, questions with answers."""
    record = fields.object_of(record)
    if "messages" in record:
        turns = fields.messages_of(record["messages"], "messages")
        if len(turns) < 2 or turns[-1][0] != "assistant":
            raise BadRow("has 'messages' that do not end in an assistant's answer to a turn before it")
        return [
            Demonstration(
                prompt=plain(turns[:-1]),
                response=turns[-1][1].strip(),
                source=source,
                group=_group(record),
                messages=turns[:-1],
            )
        ]
    if "instances" in record:
        return _instances(record, source)
    if "question" in record and "prompt" not in record:
        prompt, messages = fields.text(record, "question"), ()
        response = fields.response(record, "answer")
    else:
        prompt, messages = _prompt_or_instruction(record)
        name = next((name for name in _RESPONSE_FIELDS if name in record), "response")
        response = fields.response(record, name)
    return [
        Demonstration(
            prompt=prompt, response=response, source=source, group=_group(record), messages=messages
        )
    ]


def _prompt_or_instruction(record: dict[str, Any]) -> tuple[str, Messages]:
    if "prompt" in record or "instruction" not in record:
        return _prompt(record)
    prompt = fields.text(record, "instruction")
    context = next((name for name in _CONTEXT_FIELDS if record.get(name) not in (None, "")), None)
    return (f"{prompt}\n\n{fields.text(record, context)}" if context else prompt), ()


def _instances(record: dict[str, Any], source: str) -> list[Demonstration]:
    """One instruction with several inputs, as in Self-Instruct's seed tasks."""
    instruction, found = fields.text(record, "instruction"), []
    instances = fields.list_of(record, "instances")
    for number, instance in enumerate(instances, start=1):
        instance = fields.object_of(instance)
        own = source if len(instances) == 1 else f"{source}/{number}"
        context = fields.optional_text(instance, "input")
        prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
        output = fields.response(instance, "output")
        found.append(Demonstration(prompt=prompt, response=output, source=own, group=instruction))
    return found


def preferences(record: Any, source: str) -> list[Preference]:
    """``chosen`` and ``rejected`` with a prompt, with topic and stance, or as transcripts; rankings give their pairs.

    With ``topic`` and ``stance`` (argument pairs) the prompt is made of both, and the topic is the group, so that both
    stances of a topic stay on one side of a split. Of transcripts (HH-RLHF) the prompt is what both share, up to and
    with the last "\\n\\nAssistant:" in it; of conversations, the messages that both share. ``votes_chosen``,
    ``votes_rejected`` and ``votes_equal`` are kept. Responses lose the blanks around them, prompts do not.

    ``labels``, an object, says by each of several objectives how likely it is that ``chosen`` is the better one: a
    number from 0 to 1, or null. Pairs with two labels (PKU-SafeRLHF: ``response_0``, ``response_1``,
    ``better_response_id``, ``safer_response_id``) have labels "better", by which ``chosen`` is chosen, and "safer".
    """
    record = fields.object_of(record)
    if "chosen" not in record and "better_response_id" in record:
        record = _judged_twice(record)
    if "chosen" not in record and _is_ranking(record):
        return [pair for ranking in rankings(record, source) for pair in pairs_of(ranking)]
    group = _group(record)
    chosen, rejected = (fields.value_of(record, name) for name in ("chosen", "rejected"))
    if "prompt" not in record and isinstance(chosen, list):
        messages, chosen, rejected = _split_conversations(chosen, rejected)
        prompt = plain(messages)
    elif "prompt" not in record and not ("topic" in record and "stance" in record):
        _differ(fields.text(record, "chosen"), fields.text(record, "rejected"), "")
        messages = ()
        prompt, chosen, rejected = _split_transcripts(chosen, rejected)
    else:
        if "prompt" in record:
            prompt, messages = _prompt(record)
        else:
            prompt = (
                f"Topic: {fields.text(record, 'topic')}\nStance: {fields.text(record, 'stance')}\nArgument:"
            )
            messages, group = (), group or fields.text(record, "topic")
        for name in ("chosen", "rejected"):
            fields.response(record, name)
        _differ(chosen, rejected, "")
        chosen, rejected = fields.response(record, "chosen"), fields.response(record, "rejected")
    chosen, rejected = chosen.strip(), rejected.strip()
    _differ(chosen, rejected, " but for blanks around them")
    return [
        Preference(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=source,
            group=group,
            votes=_votes(record),
            messages=messages,
            labels=fields.labels(record, "labels"),
        )
    ]


def _judged_twice(record: dict[str, Any]) -> dict[str, Any]:
    """A pair of PKU-SafeRLHF (Ji et al. 2023), which says of two responses which is better and which is safer."""
    better = _place(record, "better_response_id")
    safer = _place(record, "safer_response_id") if record.get("safer_response_id") is not None else None
    responses = [fields.response(record, name) for name in ("response_0", "response_1")]
    if responses[0] == responses[1]:
        raise BadRow("has 'response_0' equal to 'response_1', so that neither can be preferred")
    own = record["labels"] if isinstance(record.get("labels"), dict) else {}
    judged = {"better": 1, "safer": None if safer is None else int(safer == better)}
    return {
        **record,
        "chosen": responses[better],
        "rejected": responses[1 - better],
        "labels": {**own, **judged},
    }


def _place(record: dict[str, Any], name: str) -> int:
    place = fields.value_of(record, name)
    if isinstance(place, bool) or place not in (0, 1):
        shown = repr(place) if isinstance(place, int | float) else fields.kind_of(place)
        raise BadRow(f"has {shown} in '{name}' where 0 or 1 is expected")
    return int(place)


def _differ(chosen: Any, rejected: Any, how: str) -> None:
    if chosen == rejected:
        end = how or ", so that neither can be preferred"
        raise BadRow(f"has 'chosen' equal to 'rejected'{end}")


def _votes(record: dict[str, Any]) -> tuple[int, int, int] | None:
    if "votes_chosen" not in record and "votes_rejected" not in record:
        return None
    won, lost = fields.count(record, "votes_chosen"), fields.count(record, "votes_rejected")
    neither = fields.count(record, "votes_equal") if record.get("votes_equal") is not None else 0
    if not won + lost:
        raise BadRow(f"has no vote for either side ({neither} for neither), so that nothing is preferred")
    return won, lost, neither


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    shared = _shared(chosen, rejected)
    start = chosen.rfind(ASSISTANT_TURN, 0, shared)
    if start < 0:
        raise BadRow(
            "has no 'prompt', and its 'chosen' and 'rejected' share no beginning up to an '\\n\\nAssistant:'"
        )
    end = start + len(ASSISTANT_TURN)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[end:].strip():
            raise BadRow(f"has nothing after the shared '\\n\\nAssistant:' in '{name}'")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversations(chosen: Any, rejected: Any) -> tuple[Messages, str, str]:
    first, second = fields.messages_of(chosen, "chosen"), fields.messages_of(rejected, "rejected")
    shared = _shared(first, second)
    ends = {"chosen": first[shared:], "rejected": second[shared:]}
    for name, turns in ends.items():
        if not shared or len(turns) != 1 or turns[0][0] != "assistant":
            raise BadRow(
                f"has no 'prompt', and its 'chosen' and 'rejected' do not share all messages but one answer "
                f"of the assistant (what is left of '{name}' has {len(turns)})"
            )
    return first[:shared], ends["chosen"][0][1], ends["rejected"][0][1]


def _shared(first: Any, second: Any) -> int:
    """How many elements two sequences share from the beginning."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def rankings(record: Any, source: str) -> list[Ranking]:
    """K responses with what annotators said of them.

    Either ``prompt`` with ``responses`` (or ``completions``) and ``ranks``, 1 the best, one list or one list for each
    annotator; or the fine-grained feedback of Wu et al. (2023): ``question``, ``passages``, ``prediction 1`` to ``4``,
    and ``preference`` for each pair in order (1: the former is better, 2: the latter, 0: neither).
    """
    record = fields.object_of(record)
    if "prediction 1" in record:
        names = [name for number in range(1, 10) if (name := f"prediction {number}") in record]
        responses = tuple(fields.response(record, name) for name in names)
        comparisons, prompt, messages = _of_pairs(record, len(responses)), question_with_passages(record), ()
    else:
        prompt, messages = _prompt(record)
        name = "responses" if "responses" in record or "completions" not in record else "completions"
        given = fields.list_of(record, name)
        responses = tuple(fields.response({name: value}, name) for value in given)
        comparisons = _of_ranks(fields.list_of(record, "ranks"), len(responses))
    if len(responses) < 2:
        raise BadRow("has one response, where a ranking needs two or more")
    if all(comparison.for_first == comparison.for_second for comparison in comparisons):
        raise BadRow("has all votes tied, so that nothing is preferred")
    return [
        Ranking(
            prompt=prompt,
            responses=responses,
            comparisons=comparisons,
            source=source,
            group=_group(record),
            messages=messages,
        )
    ]


def _is_ranking(record: dict[str, Any]) -> bool:
    return "prediction 1" in record or "ranks" in record


def question_with_passages(record: dict[str, Any]) -> str:
    """The question and the passages it is to be answered from, as the models of Wu et al. (2023) are prompted."""
    question = fields.text(record, "question")
    context = [
        f"wikiPage: {passage[0]} text: {' '.join(passage[1:])}"
        for passage in record.get("passages") or ()
        if isinstance(passage, list) and passage and all(isinstance(text, str) for text in passage)
    ]
    return fields.checked(
        f"question: {question} context: {' '.join(context)}" if context else question, "passages"
    )


def _of_pairs(record: dict[str, Any], count: int) -> tuple[Comparison, ...]:
    places = [(first, second) for first in range(count) for second in range(first + 1, count)]
    said = fields.list_of(record, "preference")
    if len(said) != len(places) or any(value not in (0, 1, 2) for value in said):
        raise BadRow(
            f"has {len(said)} values in 'preference' where {len(places)} of 0, 1 or 2 are expected, one a pair"
        )
    return tuple(
        Comparison(
            first=first,
            second=second,
            for_first=int(value == 1),
            for_second=int(value == 2),
            for_neither=int(value == 0),
        )
        for (first, second), value in zip(places, said, strict=True)
    )


def _of_ranks(given: list[Any], count: int) -> tuple[Comparison, ...]:
    annotators = given if isinstance(given[0], list) else [given]
    for ranks in annotators:
        if not isinstance(ranks, list) or len(ranks) != count or not all(map(_is_number, ranks)):
            raise BadRow(
                f"has 'ranks' that are not {count} numbers, one a response (or a list of such lists)"
            )
    found = []
    for first in range(count):
        for second in range(first + 1, count):
            differences = [ranks[first] - ranks[second] for ranks in annotators]
            won, lost = sum(value < 0 for value in differences), sum(value > 0 for value in differences)
            found.append(
                Comparison(
                    first=first,
                    second=second,
                    for_first=won,
                    for_second=lost,
                    for_neither=len(annotators) - won - lost,
                )
            )
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def prompts(record: Any, source: str) -> list[Prompt]:
    """A text; a prompt or question with the answer a verifier wants (GSM8K: what follows "####"; game of 24: 24)."""
    if isinstance(record, str):
        return [Prompt(prompt=fields.checked(record, "prompt"), source=source)]
    record = fields.object_of(record)
    if isinstance(record.get("question"), dict):  # PRM800K
        record = {"prompt": record["question"].get("problem"), **record["question"]}
    elif "question" in record and "prompt" not in record:
        record = {"prompt": record["question"], **record}
    if isinstance(record.get("answer"), list):  # samples of the game of 24
        record = {**record, "answer": "24"}
    prompt, messages = _prompt(record)
    answer = fields.optional_text(record, *_ANSWER_FIELDS).rpartition("####")[2].strip()
    return [Prompt(prompt=prompt, source=source, answer=answer, group=_group(record), messages=messages)]


def unpaired(record: Any, source: str) -> list[Unpaired]:
    """``completion`` and ``label`` with a prompt, or ``text`` and ``label`` without; samples of the game of 24."""
    record = fields.object_of(record)
    if isinstance(record.get("answer"), list):
        prompt = fields.text(record, "question")
        return [
            Unpaired(
                prompt=prompt,
                response=fields.response(fields.object_of(sample), "text"),
                desirable=fields.truth(sample, "correct"),
                source=f"{source}/{number}",
            )
            for number, sample in enumerate(fields.list_of(record, "answer"), start=1)
        ]
    desirable = fields.truth(record, "label")
    if "text" in record and "completion" not in record:
        prompt, messages, response = "", (), fields.response(record, "text")
    else:
        prompt, messages = _prompt(record)
        name = next((name for name in ("completion", "response") if name in record), "completion")
        response = fields.response(record, name)
    return [
        Unpaired(
            prompt=prompt,
            response=response,
            desirable=desirable,
            source=source,
            group=_group(record),
            messages=messages,
        )
    ]


def _prompt(record: dict[str, Any]) -> tuple[str, Messages]:
    prompt, messages = fields.prompt(record)
    return (plain(messages), messages) if prompt is None else (prompt, ())


def _group(record: dict[str, Any]) -> str:
    return fields.optional_text(record, "group")
