"""Oracle: transformers' PyTorch implementation of every family, at random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.families import FAMILIES, config_from_huggingface, config_to_huggingface
from rlhf_jax.models.huggingface import (
    from_pretrained,
    load_pretrained_scalar,
    save_pretrained,
    save_pretrained_scalar,
)

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "hidden_activation": "gelu_pytorch_tanh",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
# Name -> (config class of transformers, its arguments). The windows are shorter than the rows, so that they matter.
MODELS = {
    "llama2_all_biases_untied": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3_tied": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 6}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
            },
        },
    ),
    "gpt2": ("GPT2", {"n_inner": 40}),
    "gpt2_untied": ("GPT2", {"tie_word_embeddings": False, "activation_function": "relu"}),
    "pythia": ("GPTNeoX", {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "neox_sequential": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "silu"},
    ),
}
# One row whole, one padded on the left, one of two packed texts: the lengths and the segments of 16 columns.
TOKENS = np.random.default_rng(0).integers(0, 37, size=(3, 16))
MASK = np.arange(16)[None] >= np.array([[0], [5], [0]])
SEGMENTS = np.where(np.arange(16) < [[16], [16], [7]], 0, 1)
TEXTS = [(0, slice(0, 16)), (1, slice(5, 16)), (2, slice(0, 7)), (2, slice(7, 16))]

logits_of = jax.jit(decoder.logits, static_argnums=0)
hidden_of = jax.jit(decoder.hidden_states, static_argnums=0)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def their_model(name, torch):
    import transformers

    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes, attn_implementation="eager")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, must matter
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def their_logits(model, torch):
    with torch.no_grad():
        return [model(input_ids=torch.tensor(TOKENS[[row], part])).logits[0].numpy() for row, part in TEXTS]


def assert_ours_are_theirs(config, params, theirs):
    ours = np.asarray(logits_of(config, params, TOKENS, MASK, segment_ids=SEGMENTS))
    for (row, part), expected in zip(TEXTS, theirs, strict=True):
        assert expected.std() > 0.3
        np.testing.assert_allclose(ours[row, part], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_and_out_against_transformers(torch, name, tmp_path):
    import transformers

    model = their_model(name, torch)
    expected = their_logits(model, torch)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    config, params = from_pretrained(tmp_path / "theirs")
    assert_ours_are_theirs(config, params, expected)

    save_pretrained(tmp_path / "ours", config, params, max_shard_bytes=12_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(again) is type(model)
    for ours, theirs in zip(their_logits(again.float().eval(), torch), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    reread, back = from_pretrained(tmp_path / "ours")
    assert reread == config
    jax.tree.map(np.testing.assert_array_equal, params, back)
    originals, written = (tensors_of(tmp_path / side) for side in ("theirs", "ours"))
    renamed = {"embed_out.weight": "lm_head.weight"}
    written = {renamed.get(key, key): value for key, value in written.items()}
    originals = {renamed.get(key, key): value for key, value in originals.items()}
    assert originals.keys() == written.keys()
    for key, value in originals.items():
        assert value.tobytes() == written[key].tobytes(), key


# One of each family.
SCORERS = ["llama3_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2_untied", "pythia"]


@pytest.mark.parametrize("name", SCORERS)
def test_a_reward_model_scores_the_same_in_transformers(torch, name, tmp_path):
    import transformers

    their_model(name, torch).save_pretrained(tmp_path / "theirs")
    config, params = from_pretrained(tmp_path / "theirs")
    params["decoder"].pop("unembedding", None)
    params["head"] = {
        "kernel": jnp.asarray(np.random.default_rng(2).normal(size=32), jnp.float32),
        "bias": 0.0,
    }
    save_pretrained_scalar(tmp_path / "scorer", config, params, pad_id=0)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "scorer", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(model).__name__ == FAMILIES[config.family].scalar
    # transformers pools at the last token that is not the padding id, so real tokens must differ from it.
    right = MASK[:, ::-1]
    tokens = np.where(right, np.maximum(TOKENS, 1), 0)
    with torch.no_grad():
        ids, mask = torch.tensor(tokens), torch.tensor(right.astype(np.int64))
        theirs = model.float().eval()(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
    config, params = load_pretrained_scalar(tmp_path / "scorer")
    hidden = hidden_of(config, params, tokens, right)
    ours = heads.last_token_values(heads.scalar_head(params["head"], hidden), jnp.asarray(right))
    assert np.abs(theirs).min() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def tensors_of(directory):
    return {
        name: value
        for file in directory.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }


def test_a_repository_of_the_hub_that_was_fetched_before(torch, tmp_path, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    their_model("qwen2", torch).save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config, params = from_pretrained("someone/small")
    assert config == from_pretrained(snapshot)[0]
    jax.tree.map(np.testing.assert_array_equal, params, from_pretrained(snapshot)[1])


def test_every_family_is_compared():
    from transformers import AutoConfig

    compared = set()
    for name, changes in MODELS.values():
        model_type = {"Gemma3Text": "gemma3_text", "GPTNeoX": "gpt_neox"}.get(name, name.lower())
        assert AutoConfig.for_model(model_type, **SIZES | changes).model_type == model_type
        compared.add(model_type)
    assert compared == set(FAMILIES)


# What the hub holds is older than transformers 5: fields that it spells otherwise, or leaves to a default.
HUB = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}


def test_older_spellings_mean_what_they_meant():
    gpt2 = config_from_huggingface(HUB["gpt2"])
    assert (gpt2.mlp_width, gpt2.head_dim, gpt2.tied_embeddings, gpt2.activation) == (
        3072,
        64,
        True,
        "gelu_tanh",
    )
    pythia = config_from_huggingface(HUB["gpt_neox"])
    assert (pythia.rotary_dim, pythia.rope_theta, pythia.parallel_residual, pythia.qkv_bias) == (
        16,
        1e4,
        True,
        True,
    )
    llama = config_from_huggingface(HUB["llama"])
    assert (llama.rope_scaling, llama.rope_factor, llama.rope_original_length) == ("llama3", 32.0, 8192)
    assert llama.rope_theta == 5e5
    gemma = config_from_huggingface(HUB["gemma3_text"])
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.tied_embeddings) == (1e6, 1e4, True)
    assert gemma.window_pattern == (True,) * 5 + (False,) and sum(gemma.windowed) == 22


@pytest.mark.parametrize("family", HUB)
def test_what_is_written_reads_back(family):
    config = config_from_huggingface(HUB[family])
    assert config_from_huggingface(config_to_huggingface(config)) == config


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "llama",
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            ("MambaForCausalLM", "Gemma3"),
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification",)),
        ("llama", {"hidden_act": "mish"}, ("hidden_act", "mish", "silu")),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ("rope_type", "yarn", "llama3")),
        ("llama", {"rope_scaling": {"type": "linear"}}, ("factor", "linear")),
        ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
        ("llama", {"intermediate_size": None}, ("intermediate_size",)),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx",)),
        ("gemma3_text", {"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "None")),
        ("gemma3_text", {"layer_types": ["full_attention"]}, ("layer_types", "26")),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 26}, ("layer_types", "chunked_attention")),
        ("gemma3_text", {"sliding_window": -3}, ("window", "-3")),
    ],
)
def test_a_config_this_decoder_does_not_compute(family, changes, words):
    with pytest.raises(InputError) as error:
        config_from_huggingface(HUB[family] | changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("family", HUB)
@pytest.mark.parametrize("value", [None, "x", [], {}, [1], {"a": 1}, -1, 0, 1.5, True, float("nan")])
def test_no_value_of_a_field_gives_anything_but_a_config_or_a_sentence(family, value):
    extra = (
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "id2label",
    )
    refusals = 0
    for name in (*HUB[family], *extra):
        try:
            config_from_huggingface(HUB[family] | {name: value})
        except InputError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_key_norms": True}, ("query_key_norms", "llama")),
        ({"family": "qwen3"}, ("query_key_norms", "qwen3")),
        ({"family": "mistral", "qkv_bias": True}, ("qkv_bias", "mistral")),
        ({"qkv_bias": True}, ("qkv_bias", "llama")),
        ({"window": 4}, ("window", "llama")),
        ({"family": "bert"}, ("family", "bert", "gpt_neox")),
    ],
)
def test_what_a_family_cannot_say_is_not_written(changes, words):
    config = dataclasses.replace(config_from_huggingface(HUB["llama"]), **changes)
    with pytest.raises(InputError) as error:
        config_to_huggingface(config)
    for word in words:
        assert word in str(error.value)
