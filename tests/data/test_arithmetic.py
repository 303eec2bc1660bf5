"""Sums by hand, labels against an independent reading of the text, and rows that are what they say."""

import numpy as np
import pytest

from rlhf_jax.data import arithmetic, tokenizer
from rlhf_jax.data.arithmetic import ArithmeticConfig
from rlhf_jax.errors import InputError

CONFIG = ArithmeticConfig(num_demonstrations=2000, num_prompts=500, num_eval_prompts=100)


def test_worked_answers_by_hand():
    assert arithmetic.work_out(17, 25) == "7+5+0=12;1+2+1=4;#### 42"
    assert arithmetic.work_out(999, 1) == "9+1+0=10;9+0+1=10;9+0+1=10;#### 1000"
    assert arithmetic.work_out(0, 0) == "0+0+0=0;#### 0"
    # A slip is carried on: 7 + 5 written as 9, so nothing to carry.
    assert arithmetic.work_out(17, 25, [-3]) == "7+5+0=9;1+2+0=3;#### 39"


@pytest.mark.parametrize(
    ("response", "labels"),
    [
        ("7+5+0=12;1+2+1=4;#### 42", [True, True, True]),
        (" 7+5+0=12;1+2+1=4;#### 42 ", [True, True, True]),
        ("7+5+0=11;1+2+1=4;#### 41", [False, True, True]),
        ("7+5+0=12;1+2+0=3;#### 32", [True, False, True]),
        ("7+5+0=12;1+2+1=4;#### 43", [True, True, False]),
        ("7+5+0=12;1+2+1=4;#### 42;#### 42", [True, True, True, False]),
        ("5+7+0=12", [False]),
        ("", [False]),
        ("#### 42", [False]),
        ("7+5+0=12;;#### 42", [True, False, False]),
    ],
)
def test_step_labels_by_hand(response, labels):
    assert arithmetic.step_labels("17+25=", response) == labels


def test_a_prompt_that_asks_no_sum_has_no_right_step():
    assert arithmetic.step_labels("17-25=", "7+5+0=12;1+2+1=4") == [False, False]


def test_demonstrations_are_right_as_often_as_the_slips_say():
    right, labelled, slips = [], [], []
    for row in arithmetic.demonstrations(CONFIG):
        first, second = map(int, row.prompt[:-1].split("+"))
        right.append(first + second == int(row.response.split("#### ")[1]))
        labels = arithmetic.step_labels(row.prompt, row.response)
        labelled.append(all(labels))
        slips += [not label for label in labels[:-1]]
        assert labels[-1], "the last step only writes down what the others gave"
    assert right == labelled, "with slips of one, two of them never cancel"
    assert abs(np.mean(right) - 0.7**3) < 4 * np.sqrt(0.7**3 * (1 - 0.7**3) / 2000)
    # A slip below 0 or above 19 cannot be written: 0+0+0 is then right after all, once in a few hundred digits.
    assert abs(np.mean(slips) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 6000) + 0.005


def test_held_out_sums_are_never_trained_on():
    train = {row.prompt for row in arithmetic.prompts(CONFIG, "train")}
    train |= {row.prompt for row in arithmetic.demonstrations(CONFIG)}
    held_out = arithmetic.prompts(CONFIG, "eval")
    assert len(held_out) == 100 and not train & {row.prompt for row in held_out}
    for row in held_out:
        first, second = map(int, row.prompt[:-1].split("+"))
        assert row.answer == str(first + second)


def test_more_rows_leave_the_first_unchanged_and_the_seed_changes_them():
    fewer = ArithmeticConfig(num_demonstrations=3)
    assert arithmetic.demonstrations(fewer) == arithmetic.demonstrations(CONFIG)[:3]
    assert arithmetic.demonstrations(
        ArithmeticConfig(seed=1, num_demonstrations=3)
    ) != arithmetic.demonstrations(fewer)


def test_text_survives_the_tokenizer():
    characters = arithmetic.arithmetic_tokenizer()
    row = arithmetic.demonstrations(CONFIG)[0]
    prompt, response = tokenizer.encode(characters, row.prompt, row.response)
    assert tokenizer.decode(characters, prompt) == row.prompt
    assert tokenizer.decode(characters, response).strip() == row.response
    assert len(response) == len(row.response) + 2, "one token a character, the blank before it, and EOS"


@pytest.mark.parametrize(("field", "value"), [("num_digits", 0), ("slip_rate", 1.5), ("seed", -1)])
def test_what_makes_no_sums_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        ArithmeticConfig(**{field: value})
