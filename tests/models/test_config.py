import dataclasses
import json

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, mlp_width=12, max_length=16
)


def test_dict_round_trip_through_json():
    config = dataclasses.replace(
        CONFIG,
        rope_theta=5e5,
        tied_embeddings=False,
        compute_dtype="bfloat16",
        window=3,
        window_pattern=(True, False),
    )
    assert hash(ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))) == hash(config)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("width", 8.0),
        ("num_layers", True),
        ("num_kv_heads", 3),
        ("head_dim", 3),
        ("rope_theta", 0.0),
        ("norm_epsilon", float("nan")),
        ("tied_embeddings", "yes"),
        ("compute_dtype", "float16"),
        ("remat", "half"),
        ("norm", "batch"),
        ("activation", "mish"),
        ("positions", "none"),
        ("rope_scaling", "yarn"),
        ("attention", "flash"),
        ("gated_mlp", 1),
        ("window", 0),
        ("window", 2.5),
        ("window_pattern", ()),
        ("window_pattern", (1,)),
        ("rotary_fraction", 1.5),
        ("logit_softcap", 0),
        ("rope_high_frequency_factor", float("inf")),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(InputError) as error:
        dataclasses.replace(CONFIG, **{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)


def test_unknown_and_missing_fields_are_named():
    fields = CONFIG.to_dict()
    with pytest.raises(InputError, match="colour"):
        ModelConfig.from_dict(fields | {"colour": 1})
    del fields["mlp_width"]
    with pytest.raises(InputError, match="mlp_width"):
        ModelConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_fraction": 0.5}, ("head_dim", "1")),
        ({"head_dim": 6, "rotary_fraction": 0.25}, ("head_dim", "1")),
        ({"rope_scaling": "llama3", "rope_low_frequency_factor": 4.0}, ("rope_high_frequency_factor", "4.0")),
        (
            {"attention": "xla", "attention_softcap": 50.0},
            ("attention", "xla", "attention_softcap", "splash"),
        ),
    ],
)
def test_fields_that_contradict_each_other_are_named(changes, words):
    with pytest.raises(InputError) as error:
        dataclasses.replace(CONFIG, **changes)
    for word in words:
        assert word in str(error.value)


def test_a_hand_off_from_before_the_other_families_is_still_llama():
    old = {name: CONFIG.to_dict()[name] for name in list(CONFIG.to_dict())[:13]}
    assert list(old)[-1] == "remat"
    assert ModelConfig.from_dict(old) == CONFIG


def test_which_layers_have_a_window():
    config = dataclasses.replace(CONFIG, num_layers=5, window=4, window_pattern=(True, True, False))
    assert config.windowed == (True, True, False, True, True)
    assert dataclasses.replace(config, window=None).windowed == (False,) * 5
