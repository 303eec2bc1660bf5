"""Every policy of a ladder, and best-of-n, on the same prompts with the same judge. A stage; imports all below."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import jax

from rlhf_jax import storage
from rlhf_jax.errors import check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import inputs, prompts, rewards
from rlhf_jax.stages.handoffs import check_same_family, check_scores, load_model, load_start
from rlhf_jax.stages.run_directory import Purpose, open_run
from rlhf_jax.training import interrupt
from rlhf_jax.training.interrupt import StopRequest

SUMMARY = "summary.json"
SAMPLES = "samples.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One evaluation.

    num_prompts: held-out prompts. responses_per_prompt: responses sampled to each; more than one where prompts are few,
    as in a file of many pairs on few topics. best_of: responses a prompt among which the proxy picks; 0 leaves
    best-of-n out. num_shown: prompts whose responses the report shows side by side.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    num_prompts: int = 512
    responses_per_prompt: int = 1
    batch_size: int = 128
    best_of: int = 16
    temperature: float = 1.0
    num_shown: int = 6

    def __post_init__(self) -> None:
        check_range(self, "num_prompts", "responses_per_prompt", "batch_size", at_least=1)
        check_range(self, "best_of", "num_shown", at_least=0)


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    reference_from: str,
    reward_from: str,
    policies_from: Mapping[str, str],
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> dict[str, dict[str, float]]:
    """Measures the reference ("sft"), every named policy, and best-of-n of the reference.

    Args:
      config: see ``Config``.
      workdir: gets ``summary.json`` (name -> proxy, gold, kl, length, distinct_2, ...) and ``samples.json``.
      reference_from: the SFT run; KL is taken to it.
      reward_from: the reward-model run: the proxy.
      policies_from: name -> run directory.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between policies.
    """
    where = {"reference_from": reference_from, "reward_from": reward_from, **policies_from}
    run_ = open_run(workdir, "evaluate", config, inputs=where, parallelism="jit", mesh=mesh, stop=stop)
    meshes.check_rows(run_.mesh, config.batch_size, "config.batch_size")
    reference, reward = load_start(reference_from, run_), load_model(reward_from, run_)
    check_same_family(reference, reward)
    check_scores(reward)
    encoded = prompts.in_rounds(
        prompts.encode_held_out_prompts(run_, config.data, reference, config.num_prompts),
        config.responses_per_prompt,
    )
    judge = policies.Judge(
        model=reference.config,
        reference={"decoder": reference.params["decoder"]},
        reward=rewards.model_reward(reward, rewards.Scoring()).of_rows,
        gold=rewards.gold_reward(config.data, reference.tokenizer),
        tokenizer=reference.tokenizer,
    )
    sampling = SamplingConfig(max_new_tokens=config.data.response_length, temperature=config.temperature)
    sample = sharding.within(
        run_.mesh, policies.make_sampler(judge, sampling, run_.mesh, batch_size=config.batch_size)
    )
    key = run_.key(config.seed, Purpose.EVALUATION)

    found: dict[str, Sequence[policies.Sample]] = {}
    for name, path in {"sft": reference_from, **policies_from}.items():
        interrupt.check(stop, "an evaluation keeps nothing half-done")
        model = load_start(path, run_)
        check_same_family(reference, model, architecture=True)
        # The same key for every policy: the comparison shares its noise.
        found[name] = sample({"decoder": model.params["decoder"]}, encoded, key)
    summary = {name: policies.summarize(samples) for name, samples in found.items()}
    if config.best_of:
        draws = []
        for index in range(config.best_of):
            interrupt.check(stop, "an evaluation keeps nothing half-done")
            draws.append(sample(judge.reference, encoded, jax.random.fold_in(key, 1 + index)))
        found["best_of_n"] = policies.best_of_n(list(zip(*draws, strict=True)))
        # Sampled KL would be that of the policy drawn from, not of the choice among its draws.
        summary["best_of_n"] = policies.summarize(found["best_of_n"]) | {
            "kl": policies.best_of_n_kl(config.best_of),
            "n": config.best_of,
        }
    shown = {
        name: [dataclasses.asdict(s) for s in samples[: config.num_shown]] for name, samples in found.items()
    }
    storage.replace(run_.workdir / SAMPLES, json.dumps(shown, indent=1))
    storage.replace(run_.workdir / SUMMARY, json.dumps(summary, indent=1))
    return summary
