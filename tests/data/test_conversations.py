"""Chat templates: what of a rendered conversation is the prompt and what is the answer."""

import pytest

from rlhf_jax.data import conversations
from rlhf_jax.data import tokenizer as tk
from rlhf_jax.data.world import world_tokenizer
from rlhf_jax.errors import InputError

USER = (("user", "praise the cast ."),)
TURNS = (*USER, ("assistant", "bold songs ."), ("user", "the cast ?"))
# Words are divided by blanks here; <unk> stands for every turn mark.
MARKS = (
    "{% for m in messages %} [{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    fresh = world_tokenizer()
    fresh.chat_template = MARKS
    return fresh


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_prompt_and_answer_by_hand(tokenizer):
    prompt, answer = conversations.encode_conversation(tokenizer, TURNS, "bold cast .", "row 1")
    mark = "<unk>"
    said = [mark, "praise", "the", "cast", ".", mark, "bold", "songs", ".", "</s>", mark, "the", "cast"]
    # "?" is not a word of the world.
    assert words(tokenizer, prompt) == [*said, mark, mark]
    assert words(tokenizer, answer) == ["bold", "cast", ".", "</s>"]
    assert conversations.encode_turns(tokenizer, TURNS, "row 1") == prompt


@pytest.mark.parametrize("pad", [None, "</s>", "<pad>"])
def test_padding_absent_or_the_end_mark_changes_nothing(tokenizer, pad):
    tokenizer.pad_token = pad
    expected = tokenizer.pad_token_id if pad == "<pad>" else tk.eos_id(tokenizer)
    assert tk.pad_id(tokenizer) == expected
    _, answer = conversations.encode_conversation(tokenizer, USER, "bold .", "row 1")
    assert words(tokenizer, answer) == ["bold", ".", "</s>"]


@pytest.mark.parametrize("after", ["", " </s>", " </s> the", " ."])
def test_one_end_mark_is_the_last_id_whatever_the_template_writes_there(tokenizer, after):
    tokenizer.chat_template = MARKS.replace(" </s>", after)
    _, answer = conversations.encode_conversation(tokenizer, USER, "bold .", "row 1")
    assert words(tokenizer, answer) == ["bold", "."] + (["."] if after == " ." else []) + ["</s>"]


def test_a_template_that_rewrites_what_came_before_is_refused(tokenizer):
    # As templates do that drop the reasoning of turns that are answered.
    tokenizer.chat_template = "{{ messages | length }} " + MARKS
    with pytest.raises(InputError, match="writes the turns of row 3 otherwise once they are answered.*give"):
        conversations.encode_conversation(tokenizer, USER, "bold .", "row 3")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "row 5 is a conversation and the tokenizer has no chat template: give one"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"refuses row 5 \(roles must alternate\): mend the row",
        ),
        ("{% for m in messages %}", "refuses row 5"),
        ("{{ messages[0].content.missing.deeper }}", "refuses row 5"),
    ],
)
def test_a_template_that_fails_is_said_in_a_sentence(tokenizer, template, said):
    tokenizer.chat_template = template
    for call in (
        lambda: conversations.encode_conversation(tokenizer, USER, "bold .", "row 5"),
        lambda: conversations.encode_turns(tokenizer, USER, "row 5"),
    ):
        with pytest.raises(InputError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_template_survives_saving(tokenizer, tmp_path):
    tk.save_tokenizer(tokenizer, tmp_path)
    loaded = tk.load_tokenizer(tmp_path)
    assert conversations.encode_turns(loaded, TURNS, "row 1") == conversations.encode_turns(
        tokenizer, TURNS, "row 1"
    )
