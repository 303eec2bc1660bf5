"""Chat templates: what is trained on is the answer and EOS, and a template that hides the boundary is refused."""

import pytest

from rlhf_jax.data import batches as b
from rlhf_jax.data.conversations import encode_conversation, encode_turns
from rlhf_jax.data.rows import Demonstration, Preference, Prompt, plain_text
from rlhf_jax.data.world import world_tokenizer
from rlhf_jax.errors import InputError

TURNS = (("user", "bold warm"), ("assistant", "dull"), ("user", "fresh"))
PLAIN = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] == 'user' and 'great' or 'weak' }} {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} weak{% endif %}"
)


def tokenizer(template):
    made = world_tokenizer()
    made.chat_template = template
    return made


def words(tok, ids):
    return tok.convert_ids_to_tokens(ids)


def test_an_answer_is_divided_from_its_turns_and_ends_in_one_eos():
    tok = tokenizer(PLAIN)
    prompt, response = encode_conversation(tok, TURNS, "clever clever", "s")
    assert words(tok, prompt) == [
        "<s>",
        "great",
        "bold",
        "warm",
        "weak",
        "dull",
        "</s>",
        "great",
        "fresh",
        "weak",
    ]
    assert words(tok, response) == ["clever", "clever", "</s>"]
    assert encode_turns(tok, TURNS, "s") == prompt


@pytest.mark.parametrize("end", ["", " {{ eos_token }}", " {{ eos_token }} flat"])
def test_whatever_a_template_writes_at_the_end_eos_is_last(end):
    tok = tokenizer(PLAIN.replace(" {{ eos_token }}", end))
    prompt, response = encode_conversation(tok, TURNS[:1], "clever", "s")
    assert words(tok, response) == ["clever", "</s>"]
    assert words(tok, prompt) == ["<s>", "great", "bold", "warm", "weak"]


def test_templates_that_cannot_be_used_are_sentences():
    with pytest.raises(
        InputError, match="a:7 is a conversation and the tokenizer has no chat template: give one in"
    ):
        encode_conversation(tokenizer(None), TURNS, "clever", "a:7")
    rewrites = "{% if messages|length > 3 %}{{ bos_token }}{% endif %}" + PLAIN
    with pytest.raises(
        InputError, match="writes the turns of a:7 otherwise once they are answered.*: give a template"
    ):
        encode_conversation(tokenizer(rewrites), TURNS, "clever", "a:7")
    refuses = "{{ raise_exception('no system turns') }}"
    with pytest.raises(
        InputError, match="chat template refuses a:7 .no system turns.: mend the row, or give"
    ):
        encode_turns(tokenizer(refuses), TURNS, "a:7")


def test_conversations_and_texts_lie_in_one_batch():
    tok = tokenizer(PLAIN)
    said = {"messages": TURNS[:1], "prompt": plain_text(TURNS[:1])}
    rows = [
        Demonstration(prompt="bold", response="warm", source="1"),
        Demonstration(response="clever", source="2", **said),
        Demonstration(prompt="flat", response="stale", source="3"),
    ]
    encoded, _ = b.encode_demonstrations(rows, tok, prompt_length=8, response_length=4)
    [(batch, _)] = b.eval_batches(encoded, 3)
    shown = [words(tok, tokens[mask]) for tokens, mask in zip(batch.tokens, batch.token_mask, strict=True)]
    assert shown == [
        ["<s>", "bold", "warm", "</s>"],
        ["<s>", "great", "bold", "warm", "weak", "clever", "</s>"],
        ["<s>", "flat", "stale", "</s>"],
    ]
    pair = Preference(chosen="clever", rejected="dull", source="4", **said)
    encoded, _ = b.encode_preferences([pair], tok, prompt_length=8, response_length=4)
    assert words(tok, encoded.rows[0].rejected_ids) == ["dull", "</s>"]
    encoded, _ = b.encode_prompts([Prompt(source="5", **said)], tok, prompt_length=8)
    assert words(tok, encoded.rows[0].prompt_ids) == ["<s>", "great", "bold", "warm", "weak"]
