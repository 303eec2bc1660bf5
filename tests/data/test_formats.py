"""What each published format means, on records written out by hand; TRL's conventions as they are."""

import pytest

from rlhf_jax.data.fields import BadRow
from rlhf_jax.data.formats import demonstrations, preferences, prompts, rankings, unpaired
from rlhf_jax.data.formats_steps import process_steps
from rlhf_jax.data.rows import Comparison, Demonstration, Preference, ProcessSteps, Prompt, Unpaired


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SKY = [user("What color is the sky?")]
SKY_TEXT = "\n\nuser: What color is the sky?\n\nassistant:"
SKY_TURNS = (("user", "What color is the sky?"),)


def test_trl_standard():
    """The examples of TRL's page on dataset formats."""
    sky = {"prompt": "The sky is"}
    assert prompts(sky, "s") == [Prompt(prompt="The sky is", source="s")]
    assert demonstrations({**sky, "completion": " blue."}, "s") == [
        Demonstration(prompt="The sky is", response="blue.", source="s")
    ]
    assert preferences({**sky, "chosen": " blue.", "rejected": " green."}, "s") == [
        Preference(prompt="The sky is", chosen="blue.", rejected="green.", source="s")
    ]
    assert unpaired({**sky, "completion": " blue.", "label": True}, "s") == [
        Unpaired(prompt="The sky is", response="blue.", desirable=True, source="s")
    ]
    stepwise = {
        "prompt": "Which number is larger, 9.8 or 9.11?",
        "completions": ["The fractional part of 9.8 is 0.8.", "The fractional part of 9.11 is 0.11."],
        "labels": [True, False],
    }
    assert process_steps(stepwise, "s") == [
        ProcessSteps(
            prompt=stepwise["prompt"],
            steps=tuple(stepwise["completions"]),
            labels=(1.0, 0.0),
            source="s",
            group=stepwise["prompt"],
        )
    ]


def test_trl_conversational():
    shared = {"prompt": SKY_TEXT, "messages": SKY_TURNS, "source": "s"}
    blue, green = assistant("It is blue."), assistant("It is green.")
    assert prompts({"prompt": SKY}, "s") == [Prompt(**shared)]
    demonstration = Demonstration(response="It is blue.", **shared)
    assert demonstrations({"messages": [*SKY, blue]}, "s") == [demonstration]
    assert demonstrations({"prompt": SKY, "completion": [blue]}, "s") == [demonstration]
    pair = Preference(chosen="It is blue.", rejected="It is green.", **shared)
    assert preferences({"prompt": SKY, "chosen": [blue], "rejected": [green]}, "s") == [pair]
    assert preferences({"chosen": [*SKY, blue], "rejected": [*SKY, green]}, "s") == [pair]
    assert unpaired({"prompt": SKY, "completion": [green], "label": False}, "s") == [
        Unpaired(response="It is green.", desirable=False, **shared)
    ]


def test_a_demonstration_is_the_last_turn_of_its_conversation():
    turns = [
        {"role": "system", "content": ""},
        *SKY,
        assistant("Blue."),
        user("And grass?"),
        assistant(" Green. "),
    ]
    [row] = demonstrations({"messages": turns}, "s")
    assert row.response == "Green."
    assert row.messages == (("system", ""), *SKY_TURNS, ("assistant", "Blue."), ("user", "And grass?"))


BAD_CONVERSATIONS = [
    (demonstrations, {"messages": SKY}, "'messages' that do not end in an assistant's answer"),
    (
        demonstrations,
        {"messages": [assistant("hi")]},
        "do not end in an assistant's answer to a turn before it",
    ),
    (demonstrations, {"messages": []}, "an empty list in 'messages' where messages are expected"),
    (demonstrations, {"messages": ["hi"]}, r"a string in 'messages\[1\]' where a message with role"),
    (demonstrations, {"messages": [{"role": "user"}]}, r"null in 'messages\[1\].content'"),
    (demonstrations, {"messages": [{"content": "a"}]}, r"null in 'messages\[1\].role'"),
    (
        demonstrations,
        {"prompt": SKY, "completion": [*SKY, assistant("a")]},
        "messages of user, assistant in 'compl",
    ),
    (
        preferences,
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "do not share all messages but one",
    ),
    (
        preferences,
        {"chosen": [*SKY, assistant("a")], "rejected": [*SKY, user("x"), assistant("b")]},
        r"what is left of 'rejected' has 2",
    ),
    (
        preferences,
        {"chosen": [*SKY, assistant("a")], "rejected": "b"},
        "a string in 'rejected' where messages",
    ),
    (unpaired, {"prompt": "p", "completion": "c", "label": 0.5}, "0.5 in 'label' where true or false"),
    (unpaired, {"prompt": "p", "completion": "c"}, "no field 'label'"),
]


@pytest.mark.parametrize(("read", "record", "message"), BAD_CONVERSATIONS)
def test_what_trl_would_not_write_either(read, record, message):
    with pytest.raises(BadRow, match=message):
        read(record, "s")


def test_questions_with_answers():
    gsm = {"question": "6 clips and 3?", "answer": "<<6+3=9>>9 clips.\n#### 9"}
    assert prompts(gsm, "s") == [Prompt(prompt="6 clips and 3?", answer="9", source="s")]
    assert demonstrations(gsm, "s")[0].response == "<<6+3=9>>9 clips.\n#### 9"
    assert prompts({"prompt": "p", "solution": 3.5}, "s")[0].answer == "3.5"
    prm = {"question": {"problem": "p", "ground_truth_answer": "29"}, "label": {"steps": []}}
    assert prompts(prm, "s") == [Prompt(prompt="p", answer="29", source="s")]
    game = {
        "question": "1 1 4 6",
        "answer": [{"text": "a", "correct": True}, {"text": "b", "correct": False}],
    }
    assert prompts(game, "s") == [Prompt(prompt="1 1 4 6", answer="24", source="s")]
    assert [(row.response, row.desirable, row.source) for row in unpaired(game, "s")] == [
        ("a", True, "s/1"),
        ("b", False, "s/2"),
    ]


def test_instances_of_one_instruction_are_one_group():
    record = {
        "instruction": "Add.",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}],
    }
    rows = demonstrations(record, "s")
    assert [(row.prompt, row.response, row.group, row.source) for row in rows] == [
        ("Add.\n\n1 2", "3", "Add.", "s/1"),
        ("Add.", "?", "Add.", "s/2"),
    ]


def test_rankings_of_several_annotators():
    record = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [[1, 2, 2], [2, 1, 3], [1, 2, 3]]}
    [row] = rankings(record, "s")
    assert row.comparisons == (
        Comparison(first=0, second=1, for_first=2, for_second=1),
        Comparison(first=0, second=2, for_first=3, for_second=0),
        Comparison(first=1, second=2, for_first=2, for_second=0, for_neither=1),
    )
    assert rankings({**record, "ranks": [1, 2, 3]}, "s")[0].comparisons[0].for_first == 1
    # Read as preferences, a ranking is its pairs.
    assert [(pair.chosen, pair.votes) for pair in preferences(record, "s")] == [
        ("a", (2, 1, 0)),
        ("a", (3, 0, 0)),
        ("b", (2, 0, 1)),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 1, 1]}, "all votes tied"),
        ({"ranks": [[1, 2, 3], [3, 2, 1]]}, "all votes tied"),
        ({"ranks": [1, 2]}, "'ranks' that are not 3 numbers"),
        ({"ranks": [[1, 2, 3], [1, 2, None]]}, "'ranks' that are not 3 numbers"),
        ({"ranks": []}, "an empty list in 'ranks'"),
        ({"responses": ["a", "", "c"]}, "an empty 'responses'"),
        ({"responses": ["a"], "ranks": [1]}, "one response, where a ranking needs two"),
    ],
)
def test_rankings_that_rank_nothing(change, message):
    with pytest.raises(BadRow, match=message):
        rankings({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], **change}, "s")


FEEDBACK = {
    "question": "When?",
    "passages": [["Title", "One.", "Two."]],
    "prediction 1": "It was so. It was not. It is.",
    "prediction 2": "b",
    "prediction 3": "c",
    "feedback": {"errors": [{"error type": "Irrelevant", "start": 11, "end": 20}, {"error type": "Missing"}]},
    "preference": [1, 2, 0],
}


def test_fine_grained_feedback():
    [row] = rankings(FEEDBACK, "s")
    assert row.prompt == "question: When? context: wikiPage: Title text: One. Two."
    assert [(c.first, c.second, c.for_first, c.for_second, c.for_neither) for c in row.comparisons] == [
        (0, 1, 1, 0, 0),
        (0, 2, 0, 1, 0),
        (1, 2, 0, 0, 1),
    ]
    [steps] = process_steps(FEEDBACK, "s")
    assert "".join(steps.steps) == FEEDBACK["prediction 1"]
    assert steps.labels == (1.0, 0.0, 1.0)
    with pytest.raises(BadRow, match="2 values in 'preference' where 3 of 0, 1 or 2"):
        rankings({**FEEDBACK, "preference": [1, 2]}, "s")


def test_math_shepherd():
    given = "How many? Step 1: Two. ки\nStep 2: Three. The answer is: 3 ки"
    record = {"input": given, "label": given.replace("ки", "+", 1).replace("ки", "-"), "task": "GSM8K"}
    [row] = process_steps(record, "s")
    assert row.prompt == "How many?"
    assert row.steps == ("Step 1: Two.", "Step 2: Three. The answer is: 3")
    assert row.labels == (1.0, 0.0)
    for change, message in [
        ({"label": given}, "'label' that is not its 'input' with"),
        ({"label": record["label"].replace("Two", "Ten")}, "'label' that is not its 'input' with"),
        ({"input": given + " more"}, "does not end in 'ки'"),
        ({"input": "Step 1: Two. ки", "label": "Step 1: Two. +"}, "without a question before"),
    ]:
        with pytest.raises(BadRow, match=message):
            process_steps({**record, **change}, "s")


def _step(chosen, *ratings, human=None):
    completions = [{"text": f"{rating} {i}", "rating": rating} for i, rating in enumerate(ratings)]
    return {"completions": completions, "chosen_completion": chosen, "human_completion": human}


def test_prm800k_labels_every_judged_step_once():
    steps = [_step(1, -1, 1), _step(None, -1, human={"text": "human", "rating": None}), _step(None, 0, -1)]
    rows = process_steps(
        {"question": {"problem": "p", "ground_truth_answer": "7"}, "label": {"steps": steps}}, "s"
    )
    assert [(row.steps, row.labels) for row in rows] == [
        (("1 1", "human"), (1.0, None)),
        (("-1 0",), (0.0,)),
        (("1 1", "-1 0"), (None, 0.0)),
        (("1 1", "human", "0 0"), (None, None, 1.0)),
        (("1 1", "human", "-1 1"), (None, None, 0.0)),
    ]
    assert {(row.prompt, row.answer, row.group) for row in rows} == {("p", "7", "p")}
    bad = {"question": {"problem": "p"}, "label": {"steps": [_step(4, 1)]}}
    with pytest.raises(BadRow, match="'chosen_completion' 4 where there are 1"):
        process_steps(bad, "s")
    with pytest.raises(BadRow, match="2 in 'rating'"):
        process_steps({**bad, "label": {"steps": [_step(0, 2)]}}, "s")


def _node(text, value, *children):
    return {"text": text, "mc_value": value, "children": list(children)}


def test_a_tree_and_its_prefixes_say_the_same():
    tree = _node("q", 0.5, _node(" a", 0.75, _node(" b", 1.0), _node(" c", 0.5)), _node(" d", 0.0))
    expected = [((" a", " b"), (0.75, 1.0)), ((" a", " c"), (None, 0.5)), ((" d",), (0.0,))]
    rows = process_steps({"question": "q", "reasoning_steps": tree, "final_answer": "3"}, "s")
    assert [(row.steps, row.labels) for row in rows] == expected
    values = [("q", 0.5), ("q a b", 1.0), ("q a", 0.75), ("q a c", 0.5), ("q d", 0.0)]
    prefixes = [{"solution_prefix": prefix, "mc_value": value} for prefix, value in values]
    rows = process_steps({"question": "q", "reasoning_steps": prefixes, "final_answer": "3"}, "s")
    assert [(row.steps, row.labels) for row in rows] == expected
    with pytest.raises(BadRow, match="does not begin with its 'question'"):
        process_steps({"question": "x", "reasoning_steps": prefixes}, "s")


def test_labels_by_several_objectives():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    [row] = preferences(
        {**pair, "labels": {"helpful": 1, "harmless": 0.25, "kind": None, "true": False}}, "s"
    )
    assert row.labels == (("helpful", 1.0), ("harmless", 0.25), ("true", 0.0))
    for column in ([1, 0], "good", 3, None):  # a column of the same name that means something else
        assert preferences({**pair, "labels": column}, "s")[0].labels == ()


SAFE = {
    "prompt": "p",
    "response_0": "one",
    "response_1": "two",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


@pytest.mark.parametrize(("better", "safer", "label"), [(0, 1, 0.0), (0, 0, 1.0), (1, 0, 0.0), (1, 1, 1.0)])
def test_pairs_that_are_judged_twice(better, safer, label):
    [row] = preferences({**SAFE, "better_response_id": better, "safer_response_id": safer}, "s")
    assert (row.chosen, row.rejected) == (("one", "two"), ("two", "one"))[better]
    assert row.labels == (("better", 1.0), ("safer", label))


def test_a_pair_judged_twice_keeps_other_labels_and_lacks_what_nobody_judged():
    [row] = preferences({**SAFE, "safer_response_id": None, "labels": {"short": 0.5}}, "s")
    assert row.labels == (("short", 0.5), ("better", 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"better_response_id": 2}, "has 2 in 'better_response_id' where 0 or 1 is expected"),
        ({"better_response_id": None}, "has null in 'better_response_id' where 0 or 1 is expected"),
        ({"safer_response_id": "1"}, "has a string in 'safer_response_id'"),
        ({"response_1": None}, "has null in 'response_1' where a string is expected"),
        ({"response_0": " "}, "has an empty 'response_0'"),
        ({"response_1": "one"}, "has 'response_0' equal to 'response_1', so that neither can be preferred"),
        ({"labels": {"short": 2}}, "has 2 in 'labels.short' where a number from 0 to 1 is expected"),
        ({"labels": {"short": "yes"}}, "has a string in 'labels.short' where a number from 0 to 1"),
    ],
)
def test_bad_labels(change, message):
    with pytest.raises(BadRow, match=message):
        preferences({**SAFE, **change}, "s")


def test_a_pair_judged_twice_without_a_response():
    with pytest.raises(BadRow, match="has no field 'response_1'"):
        preferences({name: value for name, value in SAFE.items() if name != "response_1"}, "s")
