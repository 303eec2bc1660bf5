"""Many responses of one policy to each prompt, scored by gold and by several proxies. A stage; imports all below.

What best-of-n is worth for every n up to N comes from one such set (``evaluation.best_of_n``). Every proxy sees the
same responses, so that proxies differ in nothing but their choice.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping

import jax
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches, world
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import inputs, prompts, rewards, rollouts
from rlhf_jax.stages.handoffs import check_same_family, check_scores, load_model, load_start
from rlhf_jax.stages.run_directory import Purpose, open_run
from rlhf_jax.training import interrupt
from rlhf_jax.training.interrupt import StopRequest

SCORES = "scores.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One set of samples.

    num_prompts: held-out prompts. responses_per_prompt: N.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    num_prompts: int = 64
    responses_per_prompt: int = 1024
    batch_size: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "num_prompts", "responses_per_prompt", "batch_size", at_least=1)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=self.data.response_length, temperature=self.temperature)


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    policy_from: str,
    rewards_from: Mapping[str, str],
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> dict[str, np.ndarray]:
    """Samples, scores, and leaves ``scores.npz``; reads that if it is there.

    Args:
      config: see ``Config``.
      workdir: the run's directory.
      policy_from: the run of the policy that is sampled.
      rewards_from: name -> run of a reward model, or of an ensemble.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between batches.

    Returns:
      "gold", "labeller" (what those who labelled the pairs believe a response is worth: the proxy of endless data), and
      "log_prob" (nats, under the policy) -> [P, N] float32; each proxy's name -> the same, or [E, P, N] of an ensemble.

    Raises:
      InputError: no gold reward, as for files, or a reward model that does not fit the policy.
      Interrupted: stopped on request; nothing half-done is kept.
    """
    for taken in sorted({"gold", "labeller", "log_prob"} & set(rewards_from)):
        raise InputError(
            f"a proxy is called {taken!r}, which is a name of the scores' own; call it something else"
        )
    where = {"policy_from": policy_from, **rewards_from}
    run_ = open_run(workdir, "best_of_n", config, inputs=where, parallelism="jit", mesh=mesh, stop=stop)
    path = run_.workdir / SCORES
    if path.exists():
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return dict(found)
    meshes.check_rows(run_.mesh, config.batch_size, "config.batch_size")
    model = load_start(policy_from, run_)
    if config.data.path or config.data.embedded != "reviews":
        raise InputError(
            "--config.data gives rows whose gold reward and labellers nobody knows; leave its path empty, and "
            "embedded at 'reviews'"
        )
    scorers = {
        "gold": rewards.gold_reward(config.data, model.tokenizer),
        "labeller": policies.text_reward(
            model.tokenizer,
            lambda row, response, ended: world.utility(config.data.world, row.prompt, response),
        ),
        "log_prob": lambda rollout, rows: rollout.log_probs.sum(axis=1),
    }
    for name, origin in rewards_from.items():
        reward = load_model(origin, run_)
        check_same_family(model, reward)
        check_scores(reward)
        scored = rewards.model_reward(reward, rewards.Scoring())
        scorers[name] = scored.of_rows if scored.of_members is None else _of_members(scored)
    asked = prompts.encode_held_out_prompts(run_, config.data, model, config.num_prompts)
    rows = prompts.in_rounds(asked, config.responses_per_prompt)
    sample = rollouts.make_rollout(run_, model, config.sampling)
    params, key = {"decoder": model.params["decoder"]}, run_.key(config.seed, Purpose.EVALUATION)
    found: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    for number, (batch, real) in enumerate(batches.eval_batches(rows, config.batch_size)):
        interrupt.check(stop, "samples are kept once all are there")
        rollout = sample(params, batch, jax.random.fold_in(key, number), 0)
        of_rows = [rows.rows[i].row for i in batch["index"]]
        for name, score in scorers.items():
            found[name].append(np.asarray(score(rollout, of_rows), np.float32)[..., real])
    shape = (config.responses_per_prompt, len(asked))
    scores = {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
    scores = {name: np.swapaxes(x.reshape(*x.shape[:-1], *shape), -1, -2) for name, x in scores.items()}
    content = io.BytesIO()
    np.savez(content, **scores)
    storage.replace(path, content.getvalue())
    return scores


def _of_members(scored: rewards.Reward) -> policies.RowReward:
    """The scores of each member, [E, B]."""
    return lambda rollout, rows: scored.of_members(rollout)
