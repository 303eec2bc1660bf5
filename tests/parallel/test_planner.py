"""The planner's arithmetic by hand; and every stage compiled for a TPU slice, where the TPU's compiler is installed."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import plan_programs
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hlo, planner
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages.rewards import Scoring

ROOT = pathlib.Path(__file__).parents[2]
CHIP = planner.Chip(memory=1000, flops=100.0, bandwidth=10.0, links=4.0)
TINY = ModelConfig(
    vocab_size=512,
    width=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=512,
    max_length=128,
    tied_embeddings=False,
    compute_dtype="bfloat16",
    remat="full",
)


def _config(stage):
    config = plan_programs.STAGES[stage]()
    data = dataclasses.replace(config.data, prompt_length=64, response_length=64)
    return dataclasses.replace(config, data=data, batch_size=8, num_microbatches=1)


def _cost(*, flops, traffic, sent, runs=1, memory=600, beside=300):
    gather = hlo.Collective(kind="all-gather", shape=(2,), bytes=2 * sent, devices=2, times=1)
    counts = hlo.Counts(flops=flops, traffic=traffic, collectives=(gather,), unknown_loops=0)
    return planner.Cost(name="x", memory=memory, beside=beside, counts=counts, runs=runs, seconds=1.0)


def test_a_step_takes_what_its_slowest_part_takes():
    slow_memory = _cost(flops=200.0, traffic=50.0, sent=8)  # 2 s, 5 s, 2 s
    slow_links = _cost(flops=100.0, traffic=5.0, sent=8, runs=2)  # twice 1 s, 0.5 s, 2 s
    plan = planner.Plan(mesh={"data": 2, "fsdp": 1}, costs=(slow_memory, slow_links), useful_flops=450.0)
    # Communication hidden: 5 + 4; not hidden: (5 + 2) + (2 + 4).
    assert plan.step_seconds(CHIP) == (9.0, 13.0)
    assert plan.utilisation(CHIP) == (450 / (9 * 2 * 100), 450 / (13 * 2 * 100))
    assert plan.memory == 900 and plan.fits(CHIP)
    assert not plan.fits(dataclasses.replace(CHIP, memory=899))


def test_plans_that_fit_come_first_and_the_faster_before_the_slower():
    def plan(name, **cost):
        return planner.Plan(mesh={name: 1}, costs=(_cost(**cost),), useful_flops=1.0)

    small = plan("small", flops=300.0, traffic=0.0, sent=0, memory=100)
    fast = plan("fast", flops=200.0, traffic=0.0, sent=0)
    large = plan("large", flops=100.0, traffic=0.0, sent=0, memory=2000)
    assert planner.ranked([large, small, fast], CHIP) == [fast, small, large]
    unknown = planner.Chip(memory=1000, flops=math.nan, bandwidth=math.nan, links=math.nan)
    assert planner.ranked([large, fast, small], unknown) == [small, fast, large]


def test_meshes_divide_rows_and_heads():
    found = list(planner.meshes_of(8, rows=4, heads=2))
    # On 8 devices one row each is not there: the rows divide over at most 4, so that the heads take 2.
    assert found == [
        {"data": 1, "fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 4, "fsdp": 1, "tensor": 2},
    ]
    assert list(planner.meshes_of(8, rows=3, heads=1)) == []


def test_devices_of_unknown_speed_have_memory():
    chip = planner.chip_of(jax.devices())
    assert 2**27 < chip.memory < 2**45 and math.isnan(chip.flops)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--topology=v5e:2x4 needs .* pip install 'rlhf_jax\[plan\]'"):
        planner.topology_devices("v5e:2x4")


@pytest.fixture(scope="module")
def plan_main(tmp_path_factory):
    """Runs ``experiments.plan`` for the shape of Llama 3, made small."""
    shape = json.loads((ROOT / "experiments/shapes/llama3_8b/config.json").read_text())
    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps({**shape, **small, **heads}))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "experiments.plan", f"--model={model}", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_rows_that_do_not_divide_are_refused(plan_main):
    done = plan_main("--topology=here", "--config.batch_size=9")
    assert done.returncode == 2 and done.stdout == ""
    message = "error: no mesh of 8 devices divides micro-batches of 9 rows and 2 key/value heads; change --config.batch"
    assert done.stderr.splitlines()[-1].startswith(message), done.stderr
    with pytest.raises(InputError, match="rows of a micro-batch is 9, which does not divide over 4 devices"):
        config = dataclasses.replace(plan_programs.STAGES["sft"](), batch_size=9)
        plan_programs.plan("sft", meshes.make_mesh("fsdp:4,tensor:2"), config, TINY)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("reward_model", {"members": 4}, "config.members is 4"),
        ("reward_model", {"kind": "all_pairs"}, "config.kind is 'all_pairs'"),
        ("reward_model", {"length_penalty": 1.0}, "config.length_penalty is 1.0"),
        ("grpo", {"reward": "process"}, "config.reward is 'process'"),
        (
            "ppo",
            {"credit": "step", "reward": "process", "scoring": Scoring(steps="last")},
            "config.reward is 'process'",
        ),
    ],
)
def test_what_is_not_planned_is_refused(stage, changes, message):
    config = dataclasses.replace(_config(stage), **changes)
    with pytest.raises(InputError, match=message):
        plan_programs.plan(stage, meshes.make_mesh("fsdp:4,tensor:2"), config, TINY)


def test_a_verifier_needs_no_reward_model():
    config = dataclasses.replace(_config("grpo"), reward="answer", rounds=3)
    plan = plan_programs.plan(
        "grpo", meshes.make_mesh("fsdp:8"), config, dataclasses.replace(TINY, compute_dtype="float32")
    )
    assert [(cost.name, cost.runs) for cost in plan.costs] == [
        ("sampling", 3),
        ("advantages", 1),
        ("update", config.num_epochs * config.num_minibatches),
    ]


def test_adapters_share_one_base():
    """With them DPO's reference is the base of the policy: handed over twice, it is there once."""
    mesh = meshes.make_mesh("fsdp:4,tensor:2")
    config = _config("dpo")
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=4))
    plan = plan_programs.plan("dpo", mesh, config, dataclasses.replace(TINY, compute_dtype="float32"))
    shapes = jax.eval_shape(lambda: decoder.init_params(TINY, jax.random.key(0)))
    base = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes)) / mesh.size
    assert plan.costs[0].beside == pytest.approx(-base, rel=0.01)
    # A forward pass of the policy, one of the reference, and back through the policy alone.
    assert plan.costs[0].counts.flops * mesh.size == pytest.approx(4 / 3 * plan.useful_flops, rel=0.15)


@pytest.fixture(scope="module")
def slice_of_eight():
    """The devices of v5e:2x4, which are not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU's compiler is missing: the wheel libtpu")
    return planner.topology_devices("v5e:2x4")


PROGRAMS = {
    "sft": ["update"],
    "reward_model": ["update"],
    "dpo": ["update"],
    "ppo": ["sampling", "reward", "advantages", "update"],
    "grpo": ["sampling", "reward", "advantages", "update"],
}


@pytest.mark.parametrize("stage", PROGRAMS)
def test_every_stage_compiles_for_a_slice(stage, slice_of_eight):
    mesh = meshes.make_mesh("data:2,fsdp:2,tensor:2", slice_of_eight)
    plan = plan_programs.plan(stage, mesh, _config(stage), TINY)
    assert [cost.name for cost in plan.costs] == PROGRAMS[stage]
    assert plan.fits(planner.chip_of(slice_of_eight)) and plan.whole == ()
    update = plan.costs[-1]
    # Full rematerialisation is a third on top; nothing is computed on two devices that one could do.
    work = update.runs * update.counts.flops * mesh.size
    shares = {"sft": 4 / 3, "reward_model": 4 / 3, "dpo": 5 / 4}
    if stage in shares:
        assert work == pytest.approx(shares[stage] * plan.useful_flops, rel=0.15)
    assert update.communication()["all-gather"] > 0


@pytest.mark.parametrize("topology", ["v5e:3x5", "v9:2x2"])
def test_a_slice_that_is_none(topology, slice_of_eight):
    with pytest.raises(InputError, match=f"--topology={topology} is no slice"):
        planner.topology_devices(topology)


@pytest.mark.slow
def test_the_main_prints_a_plan_for_a_script(slice_of_eight, plan_main):
    done = plan_main("--stage=rm", "--topology=v5e:2x4", "--mesh=fsdp:8", "--config.batch_size=8", "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)["plans"]
    assert plan["fits"] and plan["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert [program["name"] for program in plan["programs"]] == ["update"]
