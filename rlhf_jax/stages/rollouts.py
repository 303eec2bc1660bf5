"""What the stages that sample share: prompts, rollouts, rewards, evaluation, updates. Imports all below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import count, mean_of, merge
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import verifiers
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Model,
    Progress,
    Purpose,
    Run,
    check_context,
    check_same_family,
    check_scores,
    load_model,
    write_data_report,
)
from rlhf_jax.training.loop import fit
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import Objective, TrainState, init_train_state, make_train_step
from rlhf_jax.types import Rollout, ScoredRollout


def encode_prompts(
    run: Run, data: inputs.DataConfig, model: Model, *, num_eval_prompts: int, responses_per_prompt: int
) -> tuple[batches.Encoded, batches.Encoded]:
    """Training prompts, and held-out ones repeated for as many responses each; what was left out is kept on file.

    Raises:
      InputError: a prompt that cannot be used, or widths beyond the model's context.
    """
    check_context(model, data.prompt_length + data.response_length)
    split = inputs.load_prompts(data)
    widths = {"prompt_length": data.prompt_length, "truncation": data.truncation}
    train, report = batches.encode_prompts(split.train, model.tokenizer, **widths)
    held_out, held_out_report = batches.encode_prompts(
        split.held_out[:num_eval_prompts], model.tokenizer, **widths
    )
    write_data_report(run, split.left_out, train=report, held_out=held_out_report)
    # Whole rounds over the prompts; a row's noise depends on its place, so a prompt's responses differ.
    return train, dataclasses.replace(held_out, rows=held_out.rows * responses_per_prompt)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineState:
    """What an iteration depends on. beta: [] float32, the KL penalty. iteration: [] int32, finished iterations."""

    train: TrainState
    beta: jax.Array
    iteration: jax.Array


# (policy params, batch of prompts, key, optimiser step) -> (what was sampled and scored, each row's prompt, metrics).
Collect = Callable[
    [Any, Mapping[str, np.ndarray], jax.Array, jax.Array], tuple[ScoredRollout, np.ndarray, dict]
]


def make_iteration(
    *,
    config: Any,
    policy_of: Callable[[Any], Any],
    collect: Collect,
    prepare: Callable[[Any, Any, ScoredRollout, jax.Array], tuple[Any, dict]],
    train_step: Callable,
    reference: Any,
    gold: Callable[[Rollout, np.ndarray], np.ndarray] | None = None,
    next_beta: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[OnlineState, Mapping[str, np.ndarray]], tuple[OnlineState, dict]]:
    """``iterate(state, prompts) -> (state, metrics)``: sample, score, update; runs on the host over compiled parts.

    Args:
      config: the stage's; see ``update`` for what is read.
      policy_of: the policy among the trained params.
      collect: see ``make_collect``.
      prepare: ``prepare(params, reference, scored, beta) -> (batch, metrics)``, all that an update holds constant;
        "kl" among the metrics is the mean KL of a response to the reference, in nats.
      train_step: of ``training.step``, compiled.
      reference: params of the frozen reference.
      gold: ``gold(rollout, index of each row's prompt) -> [B]``: measured and never trained on.
      next_beta: ``next_beta(beta, observed kl)``; None keeps beta as it is.
    """

    def iterate(state: OnlineState, prompts: Mapping[str, np.ndarray]):
        key = jax.random.fold_in(state.train.key, state.iteration)
        scored, index, found = collect(
            policy_of(state.train.params), prompts, jax.random.fold_in(key, Purpose.ROLLOUT), state.train.step
        )
        batch, metrics = prepare(state.train.params, reference, scored, state.beta)
        metrics = metrics | found | _of_rollout(scored)
        if gold is not None:
            metrics["gold"] = mean_of(gold(scored.rollout, index))
        train, updates = update(
            state.train, batch, jax.random.fold_in(key, Purpose.SHUFFLE), train_step, config
        )
        beta = state.beta
        if next_beta is not None:
            beta = next_beta(beta, metrics["kl"].total / metrics["kl"].weight)
        state = OnlineState(train=train, beta=jnp.asarray(beta, jnp.float32), iteration=state.iteration + 1)
        return state, metrics | updates

    return iterate


def _of_rollout(scored: ScoredRollout) -> dict:
    mask = scored.rollout.response_mask
    return {
        "proxy": mean_of(scored.scores),
        "length": mean_of(mask.sum(axis=1)),
        "terminated": mean_of(scored.rollout.terminated),
        "tokens": count(scored.rollout.token_mask),
    }


def make_collect(
    rollout: Callable[..., Rollout],
    reward: Callable[[Rollout, np.ndarray], Any],
    *,
    group_size: int = 1,
    rounds: int = 1,
) -> Collect:
    """Samples ``group_size`` responses to each prompt and scores them, one group after another along the rows.

    Args:
      rollout: see ``make_rollout``.
      reward: ``reward(rollout, index of each row's prompt) -> [B]``: what is optimised.
      group_size: responses a prompt.
      rounds: with more than one, a batch holds that many times the prompts: groups whose rewards are all equal are
        sampled anew from further prompts until all groups have a spread or the prompts run out (DAPO's dynamic
        sampling, Yu et al. 2025, section 3.2). Groups without spread fill what is then still missing.
    """

    def collect(params, prompts, key, step):
        count_of_prompts = len(prompts["index"]) // rounds
        found: list[ScoredRollout] = []
        spread: list[np.ndarray] = []
        for number in range(rounds):
            part = slice(number * count_of_prompts, (number + 1) * count_of_prompts)
            repeated = {name: np.repeat(x[part], group_size, axis=0) for name, x in prompts.items()}
            sampled = rollout(params, repeated, jax.random.fold_in(key, number), step)
            scores = jnp.asarray(reward(sampled, repeated["index"]))
            found.append(ScoredRollout(rollout=sampled, scores=scores))
            if rounds == 1:
                return found[0], repeated["index"], {}
            groups = np.asarray(scores).reshape(-1, group_size)
            spread.append((groups != groups[:, :1]).any(axis=1))
            if sum(kept.sum() for kept in spread) >= count_of_prompts:
                break
        whether = np.concatenate(spread)
        # Those with a spread first, in the order in which they were sampled.
        chosen = np.argsort(~whether, kind="stable")[:count_of_prompts]
        rows = (chosen[:, None] * group_size + np.arange(group_size)).reshape(-1)
        # policy_step is one number for all rows.
        scored = jax.tree.map(
            lambda *parts: jnp.concatenate(parts)[rows] if parts[0].ndim else parts[0], *found
        )
        metrics = {"rounds": mean_of(float(len(found))), "groups_with_spread": mean_of(whether[chosen])}
        return scored, np.repeat(prompts["index"][chosen], group_size), metrics

    return collect


def make_rollout(run: Run, model: Model, sampling: SamplingConfig) -> Callable[..., Rollout]:
    """``rollout(params, prompts, key, step) -> Rollout``; ``prompts`` is a batch of ``batches.prompt_batches``."""
    eos_id, pad_id = tokenizers.eos_id(model.tokenizer), tokenizers.pad_id(model.tokenizer)

    @jax.jit
    def sample(params, tokens, token_mask, key, step):
        return generate(
            model.config,
            params,
            tokens,
            token_mask,
            key,
            sampling=sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            policy_step=step,
        )

    def rollout(params, prompts, key, step):
        tokens, token_mask = meshes.put_rows(run.mesh, (prompts["tokens"], prompts["token_mask"]))
        return sample(params, tokens, token_mask, key, step)

    return rollout


def model_reward(reward: Model) -> RowReward:
    """The frozen reward model of a run, its scores shifted by the offset that the run stored."""
    return policies.model_reward(reward.config, reward.params, float(reward.facts["reward_offset"]))


def load_reward(
    kind: Literal["model", "answer"],
    reward_from: str,
    run: Run,
    data: inputs.DataConfig,
    model: Model,
    encoded: Any,
) -> RowReward:
    """What a stage optimises: the reward model of ``reward_from``, or whether a response gives its prompt's answer.

    Raises:
      InputError: no reward model where one is needed, one of another tokenizer, or prompts without answers.
    """
    if kind == "answer":
        missing = next((row.row.source for row in encoded.rows if not row.row.answer), None)
        if missing is not None:
            raise InputError(
                f"{missing} has no answer, which config.reward=answer needs; give rows with one, or config.reward=model"
            )
        return policies.text_reward(
            model.tokenizer,
            lambda row, response, ended: float(verifiers.gsm8k_reward([response], [row.answer])[0]),
        )
    if not reward_from:
        raise InputError(
            "config.reward is 'model', which needs --reward_from=<run of experiments.reward_model>"
        )
    reward = load_model(reward_from, run)
    check_same_family(model, reward)
    check_scores(reward)
    check_context(reward, data.prompt_length + data.response_length)
    return model_reward(reward)


def gold_reward(data: inputs.DataConfig, tokenizer: Any) -> RowReward | None:
    """The embedded world's gold reward, to measure and never to train on; None for files, which have none."""
    gold = inputs.gold_reward(data)
    if gold is None:
        return None
    return policies.text_reward(tokenizer, lambda row, response, ended: gold(row.prompt, response, ended))


def make_evaluate(
    run: Run,
    config: Any,
    model: Model,
    held_out: batches.Encoded,
    *,
    reward: RowReward,
    gold: RowReward | None,
) -> Callable[[Any], dict[str, float]]:
    """``evaluate(policy params)``: held-out prompts with the same noise every time, so that only policies differ.

    ``config``: the stage's; ``seed``, ``sampling`` and ``batch_size`` are read.
    """
    judge = policies.Judge(
        model=model.config,
        reference={"decoder": model.params["decoder"]},
        reward=reward,
        gold=gold,
        tokenizer=model.tokenizer,
    )
    sample = policies.make_sampler(judge, config.sampling, run.mesh, batch_size=config.batch_size)
    key = run.key(config.seed, Purpose.EVALUATION)

    def evaluate(params: Any) -> dict[str, float]:
        found = policies.summarize(sample(params, held_out, key))
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def check_split(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch of rollouts that does not divide into minibatches, micro-batches and devices.

    Raises:
      InputError: names the fields.
    """
    parts = config.num_minibatches * config.num_microbatches
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into "
            f"num_minibatches={config.num_minibatches} times num_microbatches={config.num_microbatches}"
        )
    meshes.check_rows(mesh, config.batch_size // parts, "config.batch_size / (minibatches x microbatches)")


def of_prompts(reward: RowReward, encoded: batches.Encoded) -> Callable[[Rollout, np.ndarray], Any]:
    """A reward of data rows as one of indices into ``encoded``, which is what a batch of prompts carries."""
    return lambda rollout, index: reward(rollout, [encoded.rows[i].row for i in np.asarray(index)])


def update(
    train: TrainState, batch: Any, key: jax.Array, train_step: Callable, config: Any
) -> tuple[TrainState, dict]:
    """``num_epochs`` passes over the batch in fresh orders; ends early once the policy has moved too far.

    ``config``: ``num_epochs``, ``num_minibatches`` and ``early_stop_kl`` are read; the last is held against the step's
    metric ``approx_kl``, nats a token.
    """
    rows, metrics = jax.tree.leaves(batch)[0].shape[0], {}
    for epoch in range(config.num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), rows))
        for part in order.reshape(config.num_minibatches, -1):
            minibatch = batch if config.num_minibatches == 1 else jax.tree.map(lambda x: x[part], batch)  # noqa: B023
            train, found = train_step(train, {}, minibatch)
            metrics = merge(metrics, found)
            if config.early_stop_kl and found["approx_kl"].mean() > config.early_stop_kl:
                return train, metrics | {"early_stops": mean_of(1.0)}
    return train, metrics | ({"early_stops": mean_of(0.0)} if config.early_stop_kl else {})


def train(
    run: Run,
    config: Any,
    *,
    model: Model,
    params: Any,
    policy_of: Callable[[Any], Any] = lambda params: params,
    encoded: batches.Encoded,
    held_out: batches.Encoded,
    reward: RowReward,
    prepare: Callable,
    objective: Objective,
    group_size: int = 1,
    rounds: int = 1,
    next_beta: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> OnlineState:
    """Trains ``params`` on what the policy among them says, to the end of the schedule; returns the last state.

    Args:
      run: the open run.
      config: the stage's config; ``seed``, ``data``, ``optimizer``, ``schedule``, ``batch_size``, ``num_epochs``,
        ``num_minibatches``, ``num_microbatches``, ``early_stop_kl``, ``beta`` and ``sampling`` are read.
      model: the start, which is also the frozen reference.
      params: what is trained; copied, because an update donates its own.
      policy_of: the policy among them.
      encoded: training prompts.
      held_out: prompts of every evaluation.
      reward: what is optimised.
      prepare: see ``make_iteration``.
      objective: see ``training.step``.
      group_size: responses a prompt.
      rounds: see ``make_collect``.
      next_beta: see ``make_iteration``.
    """
    gold = gold_reward(config.data, model.tokenizer)
    evaluate = make_evaluate(run, config, model, held_out, reward=reward, gold=gold)
    optimizer = make_optimizer(
        config.optimizer, config.schedule.num_steps * config.num_epochs * config.num_minibatches
    )
    iterate = make_iteration(
        config=config,
        policy_of=policy_of,
        collect=make_collect(
            make_rollout(run, model, config.sampling),
            of_prompts(reward, encoded),
            group_size=group_size,
            rounds=rounds,
        ),
        prepare=jax.jit(prepare),
        train_step=meshes.compile_step(
            lambda axis: make_train_step(
                objective, optimizer, num_microbatches=config.num_microbatches, axis_name=axis
            ),
            run.mesh,
            run.parallelism,
        ),
        reference={"decoder": model.params["decoder"]},
        gold=None if gold is None else of_prompts(gold, encoded),
        next_beta=next_beta,
    )
    state = OnlineState(
        train=init_train_state(
            jax.tree.map(jnp.copy, params), optimizer, run.key(config.seed, Purpose.TRAIN)
        ),
        beta=jnp.float32(config.beta),
        iteration=jnp.zeros((), jnp.int32),
    )
    progress = Progress(
        run.stage, config.schedule.num_steps, ("proxy", "gold", "kl", "length"), line_every=10
    )
    try:
        return fit(
            state=jax.device_put(state, meshes.replicated(run.mesh)),
            step=iterate,
            batches=batches.prompt_batches(
                encoded,
                batch_size=config.batch_size // group_size * rounds,
                seed=run.data_seed(config.seed),
            ),
            schedule=config.schedule,
            workdir=run.workdir,
            progress=progress,
            stop=run.stop,
            evaluate=lambda state: evaluate(policy_of(state.train.params)),
            skipped_updates=lambda state: state.train.skipped,
        )
    finally:
        progress.close()
