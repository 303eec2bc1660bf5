"""Text to ids and back: the boundary between prompt and response, identity, and what cannot be loaded."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import tokenizer as tk
from rlhf_jax.data.world import WorldConfig, demonstrations, world_tokenizer
from rlhf_jax.errors import InputError


def _real(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / name
    if not path.exists():
        pytest.skip(f"real input missing: {path}")
    return path


def _byte_level(**specials) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's with four merges, in this order: "an", "and", " a", "::"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("an", "d"), ("Ġ", "a"), (":", ":")]
    words = [*alphabet, *("".join(pair) for pair in merges), "<end>", "<begin>", "<fill>"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<end>", **specials})


@pytest.fixture(scope="module")
def byte_level():
    return _byte_level()


def test_world_rows_by_hand():
    tokenizer = world_tokenizer()
    vocabulary = tokenizer.get_vocab()
    prompt_ids, response_ids = tk.encode(tokenizer, "praise the cast .", "bold songs .")
    assert prompt_ids == [1, *(vocabulary[word] for word in ("praise", "the", "cast", "."))]
    assert response_ids == [*(vocabulary[word] for word in ("bold", "songs", ".")), 2]
    assert tk.encode_prompt(tokenizer, "praise the cast .") == prompt_ids
    assert tk.decode(tokenizer, response_ids) == "bold songs ."
    assert tk.decode(tokenizer, prompt_ids) == "praise the cast ."


def test_the_world_comes_back_unchanged():
    tokenizer = world_tokenizer()
    rows = demonstrations(WorldConfig(num_demonstrations=500))
    encoded = tk.encode_many(tokenizer, [(row.prompt, row.response) for row in rows])
    for row, (prompt_ids, response_ids) in zip(rows, encoded, strict=True):
        assert tk.decode(tokenizer, prompt_ids) == row.prompt
        assert tk.decode(tokenizer, response_ids) == row.response
        assert response_ids[-1] == 2
        assert tk.encode(tokenizer, row.prompt, row.response) == (prompt_ids, response_ids)
    assert tk.encode_many(tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompt", "response", "prompt_tokens", "response_tokens"),
    [
        # The joining blank goes with the response.
        ("b", "and", ["b"], ["Ġ", "and"]),
        # The blank was the prompt's; as " a" is one token, it straddles and goes with the response.
        ("b ", "a", ["b"], ["Ġa"]),
        ("b:", ": c", ["b", ":"], ["Ġ", ":", "Ġ", "c"]),
        ("b\n", ":", ["b", "Ċ"], [":"]),
        ("b", "\n:", ["b"], ["Ċ", ":"]),
        # One character of several bytes stays whole.
        ("é", "é", ["Ã", "©"], ["Ġ", "Ã", "©"]),
    ],
)
def test_the_boundary_by_hand(byte_level, prompt, response, prompt_tokens, response_tokens):
    prompt_ids, response_ids = tk.encode(byte_level, prompt, response)
    assert byte_level.convert_ids_to_tokens(prompt_ids) == prompt_tokens
    assert byte_level.convert_ids_to_tokens(response_ids) == [*response_tokens, "<end>"]


@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a\n", "b", "a\nb"), ("a", " b", "a b"), ("", "b", "b")],
)
def test_one_blank_joins(prompt, response, joined):
    assert tk.join(prompt, response) == joined


@settings(max_examples=200, deadline=None)
@given(prompt=st.text("and :\né猫", min_size=1), response=st.text("and :\né猫", min_size=1))
def test_ids_are_those_of_the_joined_text(byte_level, prompt, response):
    prompt_ids, response_ids = tk.encode(byte_level, prompt, response)
    text = tk.join(prompt, response)
    assert prompt_ids + response_ids == [
        *byte_level.backend_tokenizer.encode(text).ids,
        tk.eos_id(byte_level),
    ]
    assert tk.decode(byte_level, prompt_ids + response_ids) == text
    # Nothing of the response is left to the prompt, and at most the straddling token's share the other way.
    said = byte_level.decode(prompt_ids)
    assert prompt.startswith(said)
    longest = max(len(token) for token in byte_level.get_vocab())
    assert len(prompt) - len(said) < longest


def test_bos_pad_and_eos_stand_where_they_should():
    bare = _byte_level()
    assert tk.pad_id(bare) == tk.eos_id(bare) == bare.get_vocab()["<end>"]
    full = _byte_level(bos_token="<begin>", pad_token="<fill>")
    assert tk.pad_id(full) == full.get_vocab()["<fill>"]
    assert tk.encode_prompt(full, "b") == [full.get_vocab()["<begin>"], *tk.encode_prompt(bare, "b")]
    assert tk.encode(full, "b", "c")[1] == tk.encode(bare, "b", "c")[1]


def test_what_a_policy_said_stays_visible():
    tokenizer = world_tokenizer()
    bold = tokenizer.get_vocab()["bold"]
    assert tk.decode(tokenizer, [bold, 0, 2, 3, 1, bold, 2]) == "bold <pad> </s> <unk> <s> bold"
    assert tk.decode(tokenizer, [bold, 2, 2]) == "bold </s>"
    assert tk.decode(tokenizer, [1, bold, 0]) == "bold <pad>"
    assert tk.decode(tokenizer, [2]) == tk.decode(tokenizer, []) == ""


def test_rows_are_decoded_by_mask_not_by_id():
    tokenizer = world_tokenizer()
    bold = tokenizer.get_vocab()["bold"]
    tokens = np.array([[bold, 2, 0, 0], [bold, 0, bold, 0]], np.int32)
    mask = np.array([[True, True, False, False], [True, True, True, False]])
    assert tk.decode_rows(tokenizer, tokens, mask) == ["bold", "bold <pad> bold"]


def test_fingerprint_is_stable_and_tells_tokenizers_apart(tmp_path):
    world, bytewise = world_tokenizer(), _byte_level()
    prints = {
        tk.fingerprint(world),
        tk.fingerprint(bytewise),
        tk.fingerprint(_byte_level(bos_token="<begin>")),
        tk.fingerprint(_byte_level(eos_token="<begin>")),
    }
    assert len(prints) == 4
    # Saved, loaded, and used: still the same. In a fresh process too.
    for tokenizer, name in ((world, "world"), (bytewise, "bytes")):
        tk.save_tokenizer(tokenizer, tmp_path / name)
        loaded = tk.load_tokenizer(tmp_path / name)
        loaded(["some", "longer text"], padding=loaded.pad_token is not None, truncation=True, max_length=3)
        assert tk.fingerprint(loaded) == tk.fingerprint(tokenizer)
        assert tk.encode(loaded, "the cast", "and bold .") == tk.encode(tokenizer, "the cast", "and bold .")
    script = (
        "from rlhf_jax.data import tokenizer as tk\n"
        "from rlhf_jax.data.world import world_tokenizer\n"
        "print(tk.fingerprint(world_tokenizer()))\n"
        f"print(tk.fingerprint(tk.load_tokenizer({str(tmp_path / 'bytes')!r})))"
    )
    command = [sys.executable, "-c", script]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert fresh.stdout.split() == [tk.fingerprint(world), tk.fingerprint(bytewise)]


def test_fingerprint_sees_one_merge_and_one_swapped_word(tmp_path):
    tk.save_tokenizer(_byte_level(), tmp_path)
    path = tmp_path / "tokenizer.json"
    original = json.loads(path.read_text())
    before = tk.fingerprint(tk.load_tokenizer(tmp_path))

    fewer = json.loads(json.dumps(original))
    del fewer["model"]["merges"][-1]
    path.write_text(json.dumps(fewer))
    assert tk.fingerprint(tk.load_tokenizer(tmp_path)) != before

    swapped = json.loads(json.dumps(original))
    vocabulary = swapped["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    path.write_text(json.dumps(swapped))
    assert tk.fingerprint(tk.load_tokenizer(tmp_path)) != before


def test_check_vocabulary():
    tokenizer = world_tokenizer()
    tk.check_vocabulary(tokenizer, len(tokenizer), model="models/m")
    with pytest.raises(
        InputError, match=f"ids up to {len(tokenizer) - 1} and models/m has a vocabulary of 100:"
    ):
        tk.check_vocabulary(tokenizer, 100, model="models/m")


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="absent is not a directory: give a Hugging Face directory"):
        tk.load_tokenizer(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty holds no tokenizer that can be loaded"):
        tk.load_tokenizer(empty)
    for name, text in (("cut", '{"version": "1.0", "mo'), ("other", '{"a": 1}')):
        folder = tmp_path / name
        tk.save_tokenizer(world_tokenizer(), folder)
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=f"{name} holds no tokenizer that can be loaded") as error:
            tk.load_tokenizer(folder)
        assert "\n" not in str(error.value)
    endless = tmp_path / "endless"
    tk.save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=_byte_level().backend_tokenizer), endless)
    with pytest.raises(InputError, match="endless has no eos_token: name one in its tokenizer_config.json"):
        tk.load_tokenizer(endless)


def test_real_llama_tokenizer(shared_data, tmp_path):
    folder = _real(shared_data, "models/stories260K")
    tokenizer = tk.load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tk.eos_id(tokenizer), tk.pad_id(tokenizer)) == (1, 2, 2)
    tk.check_vocabulary(tokenizer, 512, model=str(folder))
    prompt, response = "Once upon a time, there was a", "little girl named Lily — 猫.\nShe"
    prompt_ids, response_ids = tk.encode(tokenizer, prompt, response)
    assert prompt_ids + response_ids == [*tokenizer(f"{prompt} {response}")["input_ids"], 2]
    assert prompt_ids == tk.encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
    assert tk.decode(tokenizer, response_ids) == response
    assert tk.decode(tokenizer, prompt_ids) == prompt
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    assert tk.fingerprint(tk.load_tokenizer(tmp_path / "copy")) == tk.fingerprint(tokenizer)


def test_real_gpt2_tokenizer(shared_data):
    vocabulary = _real(shared_data, "tokenizers/gpt2_vocab.json")
    merges = _real(shared_data, "tokenizers/gpt2_merges.txt")
    backend = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)
    prompt_ids, response_ids = tk.encode(tokenizer, "\n\nHuman: hi\n\nAssistant:", "No, sorry")
    # By the vocabulary file: Ċ Ċ Human : Ġhi Ċ Ċ Assistant : and ĠNo , Ġsorry.
    assert prompt_ids == [50256, 198, 198, 20490, 25, 23105, 198, 198, 48902, 25]
    assert response_ids == [1400, 11, 7926, 50256]
    # BOS, EOS and padding are one id here: only the ends are dropped.
    assert tk.decode(tokenizer, response_ids) == " No, sorry"
    assert tk.pad_id(tokenizer) == 50256


def _joined(pieces, ids):
    return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(text=st.text("and :\né猫", min_size=1))
def test_bytes_of_tokens_join_to_the_text(byte_level, text):
    pieces = tk.token_bytes(byte_level)
    assert _joined(pieces, byte_level.backend_tokenizer.encode(text).ids) == text
    assert pieces[tk.eos_id(byte_level)] == b"<end>"
    assert pieces[byte_level.get_vocab()["Ġa"]] == b" a"


def test_bytes_of_tokens_are_what_a_continuation_adds(shared_data):
    world = world_tokenizer()
    vocabulary = world.get_vocab()
    pieces = tk.token_bytes(world)
    assert pieces[vocabulary["bold"]] == b" bold"
    tokenizer = tk.load_tokenizer(_real(shared_data, "models/stories260K"))
    pieces = tk.token_bytes(tokenizer)
    assert len(pieces) == 512
    for ids in np.random.default_rng(0).integers(3, 512, size=(50, 8)).tolist():
        # After "ha" a text goes on; broken characters are the decoder's own business.
        whole = tokenizer.decode([300, *ids], clean_up_tokenization_spaces=False)
        if "\ufffd" not in whole:
            assert "ha" + _joined(pieces, ids) == whole
    assert pieces[13] == b"\n"
    assert _joined(pieces, tokenizer("naïve 猫")["input_ids"][1:]) == " naïve 猫"
