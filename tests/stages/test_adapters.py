"""Adapters in the place of whole models: one base for every role, hand-offs anyone can take, what is refused."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import lora
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import (
    adapters,
    config,
    dpo,
    grpo,
    online,
    online_dpo,
    ppo,
    rejection,
    reward_model,
    sft,
)
from rlhf_jax.stages.adapters import LoraOptions
from rlhf_jax.stages.handoffs import load_beside, load_model
from rlhf_jax.stages.run_directory import open_run
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule

from .conftest import DPO, PPO, REWARD, SFT, SHARED

ROOT = pathlib.Path(__file__).parents[2]
LORA = LoraOptions(rank=2, alpha=4.0, targets=("query", "value", "down"))


def opened(tmp_path, mesh=None):
    return open_run(
        tmp_path / "open", "ppo", PPO, inputs={}, parallelism="jit", mesh=mesh, stop=StopRequest()
    )


def largest_difference(first, second):
    far = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), first, second)
    return max(jax.tree.leaves(far))


@pytest.fixture(scope="module")
def adapted_reward(ladder, tmp_path_factory) -> str:
    workdir = tmp_path_factory.mktemp("adapted") / "reward_model"
    built = dataclasses.replace(REWARD, lora=LORA)
    reward_model.run(built, workdir, init_from=ladder.sft, stop=StopRequest())
    return str(workdir)


def test_dpo_trains_the_adapter_alone_and_leaves_it_merged_and_apart(ladder, tmp_path):
    built = dataclasses.replace(DPO, lora=LORA)
    dpo.run(built, tmp_path / "dpo", init_from=ladder.sft, stop=StopRequest())
    run = opened(tmp_path)
    base, made = load_model(ladder.sft, run), load_model(str(tmp_path / "dpo"), run)
    layers, old = made.params["decoder"]["layers"], base.params["decoder"]["layers"]
    moved = {name for name in layers if largest_difference(layers[name], old[name]) > 0}
    assert moved == set(LORA.targets)
    assert largest_difference(made.params["decoder"]["embedding"], base.params["decoder"]["embedding"]) == 0

    beside = load_beside(str(tmp_path / "dpo"), run, base, LORA)
    merged = lora.merge_adapter(base.params, beside.adapter["adapter"], LORA.settings)
    assert largest_difference(merged["decoder"], made.params["decoder"]) < 1e-6
    assert all(np.abs(pair["out"]).max() > 0 for pair in beside.adapter["adapter"].values())
    # Optimiser and checkpoints are as large as the adapter: 3 targets, rank 2.
    saved = checkpoints.handoff_path(tmp_path / "dpo") / checkpoints.ADAPTER
    assert sum(
        x.size for x in jax.tree.leaves(checkpoints.restore_params(saved.parent, name=saved.name))
    ) == sum(x.size for x in jax.tree.leaves(lora.init_lora(base.config, LORA.settings, jax.random.key(0))))


def test_four_roles_of_ppo_hold_one_base(ladder, adapted_reward, tmp_path, monkeypatch):
    seen = {}
    train = online.train

    def spy(run, config, method, *, model, params, reward, **rest):
        seen.update(model=model, params=params)
        seen["state"] = train(run, config, method, model=model, params=params, reward=reward, **rest)
        return seen["state"]

    run = opened(tmp_path)
    base = load_model(ladder.sft, run)
    reward = load_beside(adapted_reward, run, base, LORA)
    shared = {
        name: reward.params["decoder"]["layers"][name] is array
        for name, array in base.params["decoder"]["layers"].items()
    }
    assert all(shared.values()), shared
    assert reward.params["decoder"]["embedding"] is base.params["decoder"]["embedding"]

    monkeypatch.setattr(online, "train", spy)
    built = dataclasses.replace(PPO, lora=LORA)
    ppo.run(built, tmp_path / "ppo", init_from=ladder.sft, reward_from=adapted_reward, stop=StopRequest())
    names = {path[1].key for path, _ in jax.tree_util.tree_leaves_with_path(seen["state"].train.params)}
    assert names == {"adapter", "head"}
    made = load_model(str(tmp_path / "ppo"), run)
    assert largest_difference(made.params["decoder"]["embedding"], base.params["decoder"]["embedding"]) == 0
    assert largest_difference(made.params["decoder"], base.params["decoder"]) > 0


def test_the_value_model_starts_as_the_reward_model(ladder, adapted_reward, tmp_path):
    run = opened(tmp_path)
    base = load_model(ladder.sft, run)
    whole = load_model(adapted_reward, run)
    beside = load_beside(adapted_reward, run, base, LORA)
    trained = {"policy": {"decoder": base.params["decoder"]}, "value": dict(beside.adapter)}
    roles = adapters.detach(base.config, trained, LORA.settings, jax.random.key(0))
    attached = adapters.attach(roles, base.params, LORA.settings)
    merged = adapters.merge(roles["value"], base.params, LORA.settings)
    assert largest_difference(merged["decoder"], whole.params["decoder"]) < 1e-6
    assert largest_difference(attached["value"]["head"], whole.params["head"]) == 0
    # A fresh adapter adds nothing.
    merged = adapters.merge(roles["policy"], base.params, LORA.settings)
    assert largest_difference(merged["decoder"], base.params["decoder"]) == 0


@pytest.mark.parametrize("method", ["grpo", "online_dpo", "rejection"])
def test_what_samples_trains_adapters_too(method, ladder, adapted_reward, tmp_path):
    """From KL 0, the adapter alone; of online DPO with a reference that moves, of which the base is shared."""
    built = {
        "grpo": grpo.Config(**SHARED, group_size=4),
        "online_dpo": online_dpo.Config(**SHARED, group_size=2, reference="iteration"),
        "rejection": rejection.Config(**SHARED, group_size=2),
    }[method]
    built = dataclasses.replace(built, lora=LORA, num_eval_prompts=12, schedule=Schedule(num_steps=2))
    stage = {"grpo": grpo, "online_dpo": online_dpo, "rejection": rejection}[method]
    stage.run(built, tmp_path / method, init_from=ladder.sft, reward_from=adapted_reward, stop=StopRequest())
    rows = [row for row in read_metrics(tmp_path / method / "metrics.jsonl") if "kl" in row]
    assert abs(rows[0]["kl"]) < 1e-5
    run = opened(tmp_path)
    base, made = load_model(ladder.sft, run), load_model(str(tmp_path / method), run)
    layers, old = made.params["decoder"]["layers"], base.params["decoder"]["layers"]
    assert {name for name in layers if largest_difference(layers[name], old[name]) > 0} == set(LORA.targets)


def test_a_reference_that_moves_shares_the_base(ladder, tmp_path):
    base = load_model(ladder.sft, opened(tmp_path))
    trained = adapters.detach(base.config, base.params, LORA.settings, jax.random.key(0))
    method = online.Method(prepare=None, objective=None, reads_reference="iteration", lora=LORA.settings)
    own = online.frozen_of(method, trained, base.params)["own"]["reference"]["decoder"]
    assert own["embedding"] is base.params["decoder"]["embedding"]


def test_an_adapter_is_trained_the_same_on_every_mesh(ladder, tmp_path):
    built = dataclasses.replace(DPO, lora=LORA)
    found = []
    for name in ("data:8", "data:2,fsdp:2,tensor:2"):
        workdir = tmp_path / name
        dpo.run(built, workdir, init_from=ladder.sft, mesh=meshes.make_mesh(name), stop=StopRequest())
        path = checkpoints.handoff_path(workdir)
        found.append(jax.device_get(checkpoints.restore_params(path, name=checkpoints.ADAPTER)))
    far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), *found)
    assert max(jax.tree.leaves(far)) < 1e-4, (
        far
    )  # four steps at a rate of 0.01, by Adam, which divides noise by noise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dataclasses.replace(LORA, rank=3), "adapter of .* is another.*rank: 2 -> 3"),
        (dataclasses.replace(LORA, targets=("query",)), "adapter of .* is another.*targets"),
    ],
)
def test_another_adapter_is_refused(ladder, adapted_reward, tmp_path, options, message):
    run = opened(tmp_path)
    with pytest.raises(InputError, match=message):
        load_beside(adapted_reward, run, load_model(ladder.sft, run), options)


def test_an_adapter_on_another_base_is_refused(ladder, adapted_reward, tmp_path):
    run = opened(tmp_path)
    other = dataclasses.replace(load_model(ladder.sft, run), origin=ladder.reward_model)
    with pytest.raises(
        InputError, match="is an adapter on .*sft, and this run's base is .*reward_model; start both"
    ):
        load_beside(adapted_reward, run, other, LORA)


def test_a_reward_model_that_was_trained_whole_is_refused_by_ppo_alone(ladder, tmp_path):
    built = dataclasses.replace(PPO, lora=LORA)
    where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
    with pytest.raises(InputError, match="lora.rank is 2.*trained whole; train it from"):
        ppo.run(built, tmp_path / "ppo", **where, stop=StopRequest())
    run = opened(tmp_path)
    found = load_beside(ladder.reward_model, run, load_model(ladder.sft, run), LORA)
    assert found.adapter is None and "head" in found.params


def test_where_an_adapter_makes_no_sense():
    with pytest.raises(InputError, match="lora.rank is 2 and model.path is empty"):
        dataclasses.replace(SFT, lora=LORA)
    with pytest.raises(InputError, match="lora.rank is 2 and members is 3"):
        dataclasses.replace(REWARD, lora=LORA, members=3)
    with pytest.raises(InputError, match="targets is .*'quarry'"):
        LoraOptions(rank=2, targets=("quarry",))
    with pytest.raises(InputError, match="config.targets is 'query'; it must be a list"):
        config.from_dict(LoraOptions, {"targets": "query"})
    assert config.from_dict(LoraOptions, {"targets": ["query"]}).targets == ("query",)
    assert isinstance(SFT, sft.Config) and LoraOptions().settings is None


def test_a_run_of_adapters_goes_on_where_it_stopped(ladder, tmp_path):
    from rlhf_jax.training.interrupt import Interrupted

    from .conftest import StopAfter

    built = dataclasses.replace(REWARD, lora=LORA)
    reward_model.run(built, tmp_path / "whole", init_from=ladder.sft, stop=StopRequest())
    with pytest.raises(Interrupted):
        reward_model.run(built, tmp_path / "cut", init_from=ladder.sft, stop=StopAfter(3))
    reward_model.run(built, tmp_path / "cut", init_from=ladder.sft, stop=StopRequest())
    first, second = (
        checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(tmp_path / name)))
        for name in ("whole", "cut")
    )
    assert largest_difference(first, second) == 0


def test_an_adapter_is_exported_as_peft_writes_it(adapted_reward, ladder, tmp_path):
    def export(*arguments):
        command = [sys.executable, "-m", "experiments.export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)

    done = export(f"--run={adapted_reward}", f"--to={tmp_path / 'adapter'}", "--adapter_on=someone/base")
    assert done.returncode == 0, done.stderr
    handoff, location = checkpoints.load_handoff(adapted_reward)
    trained = checkpoints.restore_params(location, name=checkpoints.ADAPTER)
    settings, adapter, head = lora.load_adapter(tmp_path / "adapter", ModelConfig.from_dict(handoff.model))
    assert settings == LORA.settings and largest_difference(adapter, trained["adapter"]) == 0
    bias = float(trained["head"]["bias"]) - handoff.facts["reward_offset"]
    assert float(head["bias"]) == pytest.approx(bias, abs=1e-6)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "someone/base" and fields["task_type"] == "SEQ_CLS"

    whole = export(f"--run={ladder.sft}", f"--to={tmp_path / 'none'}", "--adapter_on=someone/base")
    assert whole.returncode == 2 and "was trained whole and has no adapter" in whole.stderr
    assert "Traceback" not in whole.stderr
