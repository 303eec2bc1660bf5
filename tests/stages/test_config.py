"""Configs from plain dicts: every error names the field, and what differs between two is said leaf by leaf."""

import dataclasses
import math
from typing import Literal

import pytest

from rlhf_jax.errors import InputError, check_range
from rlhf_jax.stages import dpo, evaluate, ppo, reward_model, sft
from rlhf_jax.stages.config import differences, from_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["linear", "cosine"] = "cosine"

    def __post_init__(self):
        check_range(self, "rate", above=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int = 3
    name: str = ""
    flag: bool = False
    limit: float | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_what_is_not_given_takes_its_default_and_whole_numbers_become_floats():
    found = from_dict(Outer, {"inner": {"rate": 1}, "limit": 2, "flag": True})
    assert found == Outer(inner=Inner(rate=1.0), limit=2.0, flag=True)
    assert type(found.inner.rate) is float and type(found.limit) is float
    assert from_dict(Outer, {"limit": None}).limit is None


@pytest.mark.parametrize("cls", [sft.Config, reward_model.Config, dpo.Config, ppo.Config, evaluate.Config])
def test_every_stage_config_survives_the_way_there_and_back(cls):
    assert from_dict(cls, dataclasses.asdict(cls())) == cls()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 3}, r"config\.cuont does not exist; Outer has count, flag, inner, limit, name"),
        ({"inner": {"rte": 3}}, r"config\.inner\.rte does not exist; Inner has kind, rate"),
        ({"count": "3"}, r"config\.count is '3'; it must be of type int"),
        ({"count": 2.5}, r"config\.count is 2\.5; it must be of type int"),
        ({"count": True}, r"config\.count is True; it must be of type int"),
        ({"count": None}, r"config\.count is None; it must be of type int"),
        ({"flag": 1}, r"config\.flag is 1; it must be of type bool"),
        ({"name": 7}, r"config\.name is 7; it must be of type str"),
        ({"limit": "high"}, r"config\.limit is 'high'; it must be of type float"),
        ({"limit": math.nan}, r"config\.limit is nan; it must be a finite number"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate is True; it must be of type float"),
        ({"inner": {"rate": -math.inf}}, r"config\.inner\.rate is -inf; it must be a finite number"),
        ({"inner": {"rate": 0}}, r"config\.inner: rate is 0\.0; it must be above 0 and at most 1"),
        ({"inner": {"kind": "step"}}, r"config\.inner\.kind is 'step'; use one of 'linear', 'cosine'"),
        ({"inner": 3}, r"config\.inner is 3; set its fields, config\.inner\.<field>=<value>"),
    ],
)
def test_an_error_names_the_field(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(Outer, values)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            sft.Config,
            {"schedule": {"num_steps": -1}},
            "config.schedule: num_steps is -1; it must be at least 1",
        ),
        (sft.Config, {"schedule": {"num_steps": 3, "eval_every": -1}}, "config.schedule: eval_every is -1"),
        (sft.Config, {"schedule": {"eval_every": 1}}, "config.schedule.num_steps is missing"),
        (sft.Config, {"optimizer": {"learning_rate": math.nan}}, "config.optimizer.learning_rate is nan"),
        (sft.Config, {"num_microbatches": 0}, "config: num_microbatches is 0"),
        (sft.Config, {"model": {"num_heads": 0}}, "config.model: num_heads is 0"),
        (sft.Config, {"data": {"world": {"noise": 0.6}}}, "config.data.world: world noise is 0.6"),
        (reward_model.Config, {"label_smoothing": 0.5}, "at least 0 and below 0.5"),
        (reward_model.Config, {"batch_size": 0}, "batch_size is 0"),
        (
            dpo.Config,
            {"data": {"soft_labels": True}},
            "data.soft_labels is True, which the losses of this stage do not",
        ),
        (dpo.Config, {"loss": {"beta": 0.0}}, "config.loss: beta is 0.0; it must be above 0"),
        (ppo.Config, {"num_minibatches": 0}, "num_minibatches is 0"),
        (ppo.Config, {"num_epochs": 0}, "num_epochs is 0"),
        (ppo.Config, {"num_eval_prompts": 0}, "num_eval_prompts is 0"),
        (ppo.Config, {"gamma": 1.5}, "gamma is 1.5; it must be at least 0 and at most 1"),
        (ppo.Config, {"beta": -0.1}, "beta is -0.1; it must be at least 0"),
        (ppo.Config, {"missing_eos_score": math.inf}, "config.missing_eos_score is inf"),
        (evaluate.Config, {"best_of": -1}, "best_of is -1; it must be at least 0"),
    ],
)
def test_a_number_that_no_stage_can_use_is_refused_before_anything_is_loaded(cls, values, message):
    with pytest.raises(InputError, match=message):
        from_dict(cls, values)


def test_differences_are_named_leaf_by_leaf():
    first = {"a": 1, "deep": {"b": [1, 2], "c": {"d": None}}, "gone": "x"}
    second = {"a": 1, "deep": {"b": [1, 3], "c": {"d": 0}}, "new": {"e": 1}}
    assert differences(first, second) == [
        "deep.b: [1, 2] -> [1, 3]",
        "deep.c.d: None -> 0",
        "gone: 'x' -> None",
        "new: None -> {'e': 1}",
    ]
    assert differences(first, first) == []
