"""One iteration for every stage that samples: collect, prepare, update; and the run around it. Imports all below."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import Maximum, count, mean_of, mean_over_rows, merge
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import adapters, data_reports, evaluations, prompts, rewards, rollouts, several_rewards
from rlhf_jax.stages.handoffs import Model, leave_handoff, load_start
from rlhf_jax.stages.run_directory import Progress, Purpose, Run, open_run
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import fit
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import Objective, TrainState, init_train_state, make_train_step
from rlhf_jax.types import Rollout, ScoredRollout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineState:
    """What an iteration depends on.

    beta: [] float32, the KL penalty. iteration: [] int32, finished iterations. multiplier: [] float32, of a constraint
    on a second reward; None without one. best: of the evaluations, where the run has patience; else None.
    """

    train: TrainState
    beta: jax.Array
    iteration: jax.Array
    multiplier: jax.Array | None = None
    best: evaluations.Best | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a method adds to sampling and updating.

    prepare: ``prepare(params, reference, scored, beta) -> (batch, metrics)``, all that an update holds constant; "kl"
    among the metrics is the mean KL of a response to the reference, in nats. objective: see ``training.step``.
    policy_of: the policy among the trained params. group_size: responses a prompt; rows are groups one after another.
    rounds, missing_eos_score: see ``rollouts.make_collect``. beta: the KL penalty to start with. next_beta:
    ``next_beta(beta, observed kl)``; None keeps it. early_stop_kl: an iteration's updates end once the metric
    ``approx_kl``, nats a token, is above; 0 never. kept: what the run leaves of the trained params. by_steps: whether
    ``prepare`` reads the scores of steps, which a process reward model alone has. rows_of_group: rows that an update
    sees of the responses to a prompt; None: as many as there are responses. reads_reference: which policy the
    objective reads, frozen, as ``{"reference": params}`` beside params: none, that of the "start", or that which the
    "iteration" began with. lora: what is trained is adapters on the reference; None: all parameters.
    """

    prepare: Callable[[Any, Any, ScoredRollout, jax.Array], tuple[Any, dict]]
    objective: Objective
    policy_of: Callable[[Any], Any] = lambda params: params
    kept: Callable[[Any], Any] = lambda params: params
    group_size: int = 1
    rounds: int = 1
    missing_eos_score: float | None = None
    beta: float = 0.0
    next_beta: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    early_stop_kl: float = 0.0
    by_steps: bool = False
    rows_of_group: int | None = None
    reads_reference: Literal["start", "iteration"] | None = None
    lora: LoraConfig | None = None


def frozen_of(method: Method, params: Any, reference: Any) -> Any:
    """What the objective reads beside what is trained, in an iteration that begins with these ``params``."""
    if method.reads_reference == "iteration":
        # An update donates what it trains: a reference made of it must keep buffers of its own. The base it does not.
        policy = jax.tree.map(jnp.copy, params)
        own = {
            "reference": policy if method.lora is None else adapters.attach(policy, reference, method.lora)
        }
    else:
        own = {"reference": reference} if method.reads_reference == "start" else {}
    return own if method.lora is None else {"base": reference, "own": own}


def make_iteration(
    method: Method,
    *,
    collect: rollouts.Collect,
    prepare: Callable[[Any, Any, ScoredRollout, jax.Array], tuple[Any, dict]],
    train_step: Callable,
    reference: Any,
    num_epochs: int,
    num_minibatches: int,
    gold: Callable[[Rollout, np.ndarray], np.ndarray] | None = None,
    next_multiplier: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[OnlineState, Mapping[str, np.ndarray]], tuple[OnlineState, dict]]:
    """``iterate(state, prompts) -> (state, metrics)``: sample, score, update; runs on the host over compiled parts.

    Args:
      method: see ``Method``.
      collect: see ``rollouts.make_collect``.
      prepare: the method's, compiled.
      train_step: of ``training.step``, over the method's objective, compiled.
      reference: params of the frozen reference.
      num_epochs: passes over what was sampled.
      num_minibatches: updates a pass.
      gold: ``gold(rollout, index of each row's prompt) -> [B]``: measured and never trained on.
      next_multiplier: see ``several_rewards``; it judges the present policy, by the metric ``proxy_2``.
    """

    def iterate(state: OnlineState, prompts: Mapping[str, np.ndarray]):
        # A pmap step leaves the key on a mesh of its own, of the same devices.
        key = jax.random.fold_in(jax.device_put(state.train.key, state.iteration.sharding), state.iteration)
        scored, index, found = collect(
            method.policy_of(state.train.params),
            prompts,
            jax.random.fold_in(key, Purpose.ROLLOUT),
            state.train.step,
            state.multiplier,
        )
        batch, metrics = prepare(state.train.params, reference, scored, state.beta)
        metrics = metrics | found | _of_rollout(scored)
        if gold is not None:
            metrics["gold"] = mean_over_rows(gold(scored.rollout, index), scored.rollout.response_mask)
        train, updates = update(
            state.train,
            frozen_of(method, state.train.params, reference),
            batch,
            jax.random.fold_in(key, Purpose.SHUFFLE),
            train_step,
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
            early_stop_kl=method.early_stop_kl,
        )
        beta = state.beta
        if method.next_beta is not None:
            beta = _next_finite(method.next_beta, beta, metrics["kl"])
        multiplier = state.multiplier
        if next_multiplier is not None:
            metrics["multiplier"] = mean_of(multiplier)
            multiplier = _next_finite(next_multiplier, multiplier, metrics["proxy_2"])
        state = OnlineState(
            train=train,
            beta=jnp.asarray(beta, jnp.float32),
            iteration=state.iteration + 1,
            multiplier=multiplier,
            best=state.best,
        )
        return state, metrics | updates

    return iterate


def _next_finite(following: Callable, value: jax.Array, observed: WeightedSum) -> jax.Array:
    """The next beta or multiplier; the present one where what was observed is not finite, which would spoil all."""
    found = following(value, observed.total / observed.weight)
    return jnp.where(jnp.isfinite(found), found, value)


def _of_rollout(scored: ScoredRollout) -> dict:
    mask = scored.rollout.response_mask
    return {
        "proxy": mean_over_rows(scored.scores, mask),
        "length": mean_over_rows(mask.sum(axis=1), mask),
        "terminated": mean_over_rows(scored.rollout.terminated, mask),
        "tokens": count(scored.rollout.token_mask),
    }


def sampler_gap(rollout: Rollout, log_probs: jax.Array) -> Maximum:
    """The largest gap, nats a token, between the sampler's log-probs and ``log_probs`` [B, R], the trainer's."""
    return Maximum(jnp.max(jnp.where(rollout.response_mask, jnp.abs(rollout.log_probs - log_probs), 0.0)))


def update(
    train: TrainState,
    frozen: Any,
    batch: Any,
    key: jax.Array,
    train_step: Callable,
    *,
    num_epochs: int,
    num_minibatches: int,
    early_stop_kl: float = 0.0,
) -> tuple[TrainState, dict]:
    """``num_epochs`` passes over the batch in fresh orders; ends early once the policy has moved too far.

    ``early_stop_kl``: the bound on the step's metric ``approx_kl``, nats a token; 0 is none.
    """
    rows, metrics = jax.tree.leaves(batch)[0].shape[0], {}
    for epoch in range(num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), rows))
        for part in order.reshape(num_minibatches, -1):
            minibatch = batch if num_minibatches == 1 else jax.tree.map(lambda x: x[part], batch)  # noqa: B023
            train, found = train_step(train, frozen, minibatch)
            metrics = merge(metrics, found)
            if early_stop_kl and found["approx_kl"].mean() > early_stop_kl:
                return train, metrics | {"early_stops": mean_of(1.0)}
    return train, metrics | ({"early_stops": mean_of(0.0)} if early_stop_kl else {})


def train(
    run: Run,
    config: Any,
    method: Method,
    *,
    model: Model,
    params: Any,
    encoded: batches.Encoded,
    held_out: batches.Encoded,
    reward: rewards.Reward,
) -> OnlineState:
    """Trains ``params`` on what the policy among them says, to the end of the schedule; returns the last state.

    Args:
      run: the open run.
      config: the stage's config; ``seed``, ``data``, ``optimizer``, ``schedule``, ``batch_size``, ``num_epochs``,
        ``num_minibatches``, ``num_microbatches``, ``stop_when``, ``constraint``, ``lora`` and ``sampling`` are read.
      method: see ``Method``.
      model: the start, which is also the frozen reference.
      params: what is trained (with ``config.lora``, by adapters); copied, because an update donates its own.
      encoded: training prompts.
      held_out: prompts of every evaluation.
      reward: what is optimised.

    Raises:
      InputError: the batch does not divide into groups, minibatches, micro-batches and devices.
    """
    check_split(config, run.mesh, group_size=method.group_size, rows_of_group=method.rows_of_group)
    gold = rewards.gold_reward(config.data, model.tokenizer)
    evaluations.check_stop_when(config, gold=gold, held_out=reward.held_out)
    evaluate = sharding.within(
        run.mesh, evaluations.make_evaluate(run, config, model, held_out, reward=reward, gold=gold)
    )
    settings = config.lora.settings
    if settings is not None:
        params = adapters.detach(model.config, params, settings, run.key(config.seed, Purpose.ADAPTER))
        params = jax.device_put(params, sharding.parameter_sharding(run.mesh, model.config, params))
        method = _adapted(method, {"decoder": model.params["decoder"]}, settings)
    next_multiplier = several_rewards.next_multiplier(config.constraint)
    optimizer = make_optimizer(
        config.optimizer, config.schedule.num_steps * config.num_epochs * config.num_minibatches
    )
    state, places = _first_state(run, config, method, params, optimizer)
    iterate = make_iteration(
        method,
        collect=rollouts.make_collect(
            rollouts.make_rollout(run, model, config.sampling, slots=config.slots),
            sharding.within(run.mesh, rollouts.of_prompts(reward.of_samples, encoded)),
            combine=reward.combine,
            step_scores=sharding.within(run.mesh, rollouts.of_prompts(reward.of_steps, encoded))
            if method.by_steps
            else None,
            group_size=method.group_size,
            rounds=method.rounds,
            missing_eos_score=method.missing_eos_score,
        ),
        prepare=sharding.within(run.mesh, jax.jit(method.prepare)),
        train_step=meshes.compile_step(
            lambda axis: make_train_step(
                method.objective, optimizer, num_microbatches=config.num_microbatches, axis_name=axis
            ),
            run.mesh,
            run.parallelism,
            places.train,
        ),
        reference={"decoder": model.params["decoder"]},
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
        gold=None if gold is None else rollouts.of_prompts(gold, encoded),
        next_multiplier=next_multiplier,
    )
    iterator = batches.prompt_batches(
        encoded,
        batch_size=config.batch_size // method.group_size * method.rounds,
        seed=run.data_seed(config.seed),
        share=run.share,
    )
    counts = data_reports.counts(run)
    progress = Progress(
        run.stage, config.schedule.num_steps, ("proxy", "gold", "kl", "length"), line_every=10
    )
    # Nobody else may hold the first state: a run that goes on would have its moments beside those that it reads.
    first = [state]
    del state

    def evaluated(state: OnlineState, found: Mapping[str, float]) -> tuple[OnlineState, bool]:
        kept = method.kept(state.train.params)
        best, ended = evaluations.after(config.stop_when, state.best, kept, found, state.iteration)
        return dataclasses.replace(state, best=best), ended

    try:
        return fit(
            state=first.pop(),
            # Prompts are small, and a method may choose among those of the whole batch.
            step=lambda state, prompts: iterate(state, hosts.gather_rows(prompts)),
            batches=iterator,
            schedule=config.schedule,
            workdir=run.workdir,
            progress=progress,
            stop=run.stop,
            evaluate=lambda state: counts | evaluate(method.policy_of(state.train.params)),
            skipped_updates=lambda state: state.train.skipped,
            evaluated=evaluated,
            sources_of=iterator.sources_of,
        )
    finally:
        progress.close()


def _first_state(
    run: Run, config: Any, method: Method, params: Any, optimizer: optax.GradientTransformation
) -> tuple[OnlineState, OnlineState]:
    """Before the first iteration, on the run's mesh; and where each part of it lives."""
    constrained = config.constraint.at_least is not None
    state = OnlineState(
        train=init_train_state(
            jax.tree.map(jnp.copy, params), optimizer, run.key(config.seed, Purpose.TRAIN)
        ),
        beta=jnp.float32(method.beta),
        iteration=jnp.zeros((), jnp.int32),
        multiplier=jnp.zeros((), jnp.float32) if constrained else None,
        best=evaluations.nothing_yet(method.kept(params)) if config.stop_when.patience else None,
    )
    places = sharding.mirrored(run.mesh, state, params, jax.tree.map(lambda x: x.sharding, params))
    return meshes.put(state, places), places


def _adapted(method: Method, base: Any, settings: LoraConfig) -> Method:
    """A method on whole parameters as one on adapters, whose base is also the frozen reference."""

    def prepare(trained: Any, reference: Any, scored: ScoredRollout, beta: jax.Array):
        return method.prepare(adapters.attach(trained, reference, settings), reference, scored, beta)

    return dataclasses.replace(
        method,
        prepare=prepare,
        objective=adapters.adapted(method.objective, settings),
        policy_of=lambda trained: method.policy_of(adapters.attach(trained, base, settings)),
        lora=settings,
    )


def run(
    stage: str,
    config: Any,
    workdir: str | os.PathLike,
    method_of: Callable[[ModelConfig, Any], Method],
    *,
    init_from: str,
    sources: rewards.Sources,
    parallelism: meshes.Parallelism,
    mesh: jax.sharding.Mesh | None,
    stop: StopRequest,
) -> None:
    """Runs a stage that trains a policy and nothing else to its hand-off; returns at once if it is there.

    Args:
      stage: its name.
      config: its config; beside what ``train`` reads: ``reward``, ``scoring``, ``num_eval_prompts``,
        ``eval_responses_per_prompt``.
      workdir: the run's directory.
      method_of: ``method_of(model config, config)``.
      init_from: the SFT run (or a Hugging Face directory): initial policy, and the frozen reference.
      sources: the runs of reward models.
      parallelism: how the update runs; sampling and scoring are always ``jit`` over the mesh.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between iterations.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    where = {"init_from": init_from} | sources.inputs
    run_ = open_run(workdir, stage, config, inputs=where, parallelism=parallelism, mesh=mesh, stop=stop)
    if run_.finished:
        return
    model = load_start(init_from, run_)
    encoded, held_out = prompts.encode_prompts(
        run_,
        config.data,
        model,
        num_eval_prompts=config.num_eval_prompts,
        responses_per_prompt=config.eval_responses_per_prompt,
    )
    reward = rewards.load_reward(config, sources, run_, model, encoded, held_out)
    with contextlib.closing(reward):
        state = train(
            run_,
            config,
            method_of(model.config, config),
            model=model,
            params={"decoder": model.params["decoder"]},
            encoded=encoded,
            held_out=held_out,
            reward=reward,
        )
    trained = adapters.result(
        evaluations.left(state.train.params, state.best), model.params, config.lora.settings
    )
    leave_handoff(
        run_, config, model, trained, made_from=list(where.values()), facts=evaluations.facts_of(state.best)
    )


def check_split(
    config: Any, mesh: jax.sharding.Mesh, *, group_size: int, rows_of_group: int | None = None
) -> None:
    """Refuses a batch that does not divide into groups, minibatches, micro-batches and devices.

    ``rows_of_group``: see `Method`.

    Raises:
      InputError: names the fields.
    """
    if config.batch_size % group_size:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into groups of {group_size}; "
            "change batch_size or group_size"
        )
    parts = config.num_minibatches * config.num_microbatches
    what, rows = "config.batch_size", config.batch_size
    if rows_of_group is not None:
        what, rows = "config.batch_size / group_size", rows // group_size * rows_of_group
    if rows % parts:
        raise InputError(
            f"{what} is {rows}, which does not divide into "
            f"num_minibatches={config.num_minibatches} times num_microbatches={config.num_microbatches}"
        )
    meshes.check_rows(mesh, rows // parts, f"{what} / (minibatches x microbatches)")
