import dataclasses
import json

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, mlp_width=12, max_length=16
)


def test_dict_round_trip_through_json():
    config = dataclasses.replace(CONFIG, rope_theta=5e5, tied_embeddings=False, compute_dtype="bfloat16")
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
