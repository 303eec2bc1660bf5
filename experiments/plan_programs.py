"""The functions that a stage runs, lowered for a mesh from shapes alone and compiled. Imports stages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import planner, sharding
from rlhf_jax.rewards import reward_model as rewards
from rlhf_jax.sampling.generate import generate
from rlhf_jax.stages import adapters, dpo, grpo, online, ppo, reward_model, reward_objectives, sft
from rlhf_jax.stages.preference_objectives import make_pair_objective
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import init_train_state, make_train_step
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, Rollout, ScoredRollout

STAGES = {
    "sft": sft.Config,
    "reward_model": reward_model.Config,
    "dpo": dpo.Config,
    "ppo": ppo.Config,
    "grpo": grpo.Config,
}


# Fields that change what a stage runs or holds in ways that are not planned: with anything else a plan would be of
# another stage than the one that runs.
_PLANNED: dict[str, dict[str, tuple]] = {
    "sft": {"pack": (False,)},
    "reward_model": {"members": (1,), "kind": ("pairs",), "length_penalty": (0.0,)},
    "dpo": {"loss.kind": ("dpo", "robust", "ipo", "hinge", "simpo", "orpo")},
    "ppo": {"reward": ("model", "answer"), "credit": ("response",)},
    "grpo": {"reward": ("model", "answer"), "credit": ("response",)},
}


class DoesNotFit(Exception):
    """The compiler found no way to run a program in the chip's memory; says what it would have needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A jitted function with the shapes it is called with, ``runs`` times a step.

    resident: what of the stage's own arrays is among them, and so is not beside them.
    """

    name: str
    function: Any
    arguments: tuple
    runs: int = 1
    resident: Any = ()


def plan(stage: str, mesh: Mesh, config: Any, model: ModelConfig) -> planner.Plan:
    """Compiles what ``stage`` runs on ``mesh``.

    Raises:
      DoesNotFit: a program by itself is too large.
      InputError: rows that do not divide over the mesh; an option that is not planned.
    """
    _check_planned(stage, config)
    meshes.check_rows(mesh, rows_of_an_update(config), "rows of a micro-batch")
    works, resident, useful = _BUILDERS[stage](mesh, config, model)
    costs = []
    for work in works:
        started = time.monotonic()
        with sharding.scope(mesh), _nothing_kept(mesh):
            compiled, text = _compile(
                work.name, work.function.lower(*work.arguments), absent=_is_absent(mesh)
            )
        costs.append(
            planner.cost_of(
                work.name,
                compiled,
                text,
                beside=planner.resident_bytes(resident) - planner.resident_bytes(work.resident),
                runs=work.runs,
                loop_steps=config.data.response_length,
                seconds=time.monotonic() - started,
            )
        )
    shapes = jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))
    return planner.Plan(
        mesh=dict(mesh.shape),
        costs=tuple(costs),
        useful_flops=useful,
        whole=tuple(str(whole) for whole in sharding.whole_axes(mesh, model, shapes)),
    )


def _check_planned(stage: str, config: Any) -> None:
    for field, values in _PLANNED[stage].items():
        value = functools.reduce(getattr, field.split("."), config)
        if value not in values:
            raise InputError(
                f"config.{field} is {value!r}, which changes what {stage} runs and is not planned; give "
                f"{' or '.join(map(repr, values))}"
            )


def rows_of_an_update(config: Any) -> int:
    """Rows of a micro-batch."""
    return config.batch_size // (config.num_microbatches * getattr(config, "num_minibatches", 1))


@contextlib.contextmanager
def _nothing_kept(mesh: Mesh) -> Iterator[None]:
    """No cache of compilations for devices that are not there: JAX would write such a program and fail to read it."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    try:
        if _is_absent(mesh):
            jax.config.update(option, math.inf)
        yield
    finally:
        jax.config.update(option, before)


def _is_absent(mesh: Mesh) -> bool:
    return mesh.devices.flat[0] not in jax.devices()


def _compile(name: str, lowered: Any, *, absent: bool) -> tuple[Any, str]:
    """The program, and its text; for devices that are absent as the compiler itself writes it.

    JAX would carry the text over from a form of the program that cannot say all that a v5p's compiler made of it
    ("async-update instruction should have 1 operands"; jax 0.10.2).
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if absent else None
            compiled = lowered.compile(compiler_options=options)
            if not absent:
                return compiled, compiled.as_text()
            # Beside parts that it tried by themselves ("extracted").
            (written,) = pathlib.Path(folder).glob("*.jit_*.after_optimizations.txt")
            return compiled, written.read_text(encoding="utf-8")
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)) or re.search(
            r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
        )
        if found is None:
            raise
        raise DoesNotFit(f"the {name} alone needs {found[1]} of {found[2]}") from None


def _parameters(mesh: Mesh, model: ModelConfig, *, head: bool = False) -> Any:
    def init(key):
        params = decoder.init_params(model, key)
        return params | {"head": heads.init_scalar_head(model, key)} if head else params

    shapes = jax.eval_shape(init, jax.random.key(0))
    return _placed(shapes, sharding.parameter_sharding(mesh, model, shapes))


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def _rows(mesh: Mesh, batch: Any) -> Any:
    """Shapes of a batch, rows split and scalars whole."""
    rows, whole = meshes.by_rows(mesh), meshes.replicated(mesh)
    return _placed(batch, jax.tree.map(lambda leaf: rows if leaf.shape else whole, batch))


def _demonstrations(data: Any, rows: int) -> DemonstrationBatch:
    width = data.prompt_length + data.response_length
    return DemonstrationBatch(
        tokens=jax.ShapeDtypeStruct((rows, width), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((rows, width), bool),
        response_mask=jax.ShapeDtypeStruct((rows, data.response_length), bool),
    )


def _update(
    mesh: Mesh,
    config: Any,
    model: ModelConfig,
    objective: Callable,
    params: Any,
    frozen: Any,
    batch: Any,
    runs: int = 1,
) -> tuple[Work, Any]:
    """The train step as a stage compiles it, for params as ``_trained`` gives them; and its state's shapes."""
    settings = config.lora.settings
    if settings is not None:
        objective = adapters.adapted(objective, settings)
        frozen = {"base": _parameters(mesh, model), "own": frozen}
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps * runs)
    state = jax.eval_shape(lambda p, key: init_train_state(p, optimizer, key), params, jax.random.key(0))
    places = sharding.mirrored(mesh, state, params, jax.tree.map(lambda leaf: leaf.sharding, params))
    state = _placed(state, places)
    step = meshes.jit_step(
        lambda axis: make_train_step(
            objective, optimizer, num_microbatches=config.num_microbatches, axis_name=axis
        ),
        mesh,
        places,
    )
    work = Work(
        name="update", function=step, arguments=(state, frozen, batch), runs=runs, resident=(state, frozen)
    )
    return work, state


def _trained(mesh: Mesh, config: Any, model: ModelConfig, params: Any) -> Any:
    """What is trained in the place of ``params``: they themselves, or adapters on them."""
    settings = config.lora.settings
    if settings is None:
        return params
    detach = lambda params, key: adapters.detach(model, params, settings, key)  # noqa: E731
    shapes = jax.eval_shape(detach, params, jax.random.key(0))
    return _placed(shapes, sharding.parameter_sharding(mesh, model, shapes))


def _passes(config: Any) -> int:
    """Forward passes that a forward and a backward pass cost: gradients of frozen kernels are not computed."""
    return 3 if config.lora.settings is None else 2


def _supervised(
    mesh: Mesh,
    config: Any,
    model: ModelConfig,
    objective: Callable,
    batch: Any,
    *,
    head: bool = False,
    reference: bool = False,
) -> tuple[list[Work], Any]:
    """The update of a stage that does not sample, and what a chip holds all the time."""
    base = _parameters(mesh, model)
    params = _trained(mesh, config, model, _parameters(mesh, model, head=head))
    frozen = {"reference": base} if reference else {}
    work, state = _update(mesh, config, model, objective, params, frozen, batch)
    # With adapters the reference is the base: two arguments, one set of arrays.
    return [work], (state, base if reference or config.lora.settings is not None else ())


def _sft(mesh: Mesh, config: sft.Config, model: ModelConfig):
    batch = _rows(mesh, _demonstrations(config.data, config.batch_size))
    useful = _passes(config) * forward_flops(model, config.data, config.batch_size)
    return (*_supervised(mesh, config, model, sft.make_objective(model), batch), useful)


def _pairs(mesh: Mesh, config: Any) -> PreferenceBatch:
    one = _demonstrations(config.data, config.batch_size)
    return _rows(mesh, PreferenceBatch(chosen=one, rejected=one))


def _reward_model(mesh: Mesh, config: reward_model.Config, model: ModelConfig):
    objective = reward_objectives.make_objective(model)
    useful = _passes(config) * forward_flops(model, config.data, 2 * config.batch_size, vocabulary=False)
    return (*_supervised(mesh, config, model, objective, _pairs(mesh, config), head=True), useful)


def _dpo(mesh: Mesh, config: dpo.Config, model: ModelConfig):
    objective = make_pair_objective(model, config.loss)
    # The policy forward and backward, the reference, where there is one, forward. It is held either way: the stage
    # hands it to the step and to the evaluation.
    passes = _passes(config) + config.loss.needs_reference
    useful = passes * forward_flops(model, config.data, 2 * config.batch_size)
    return (*_supervised(mesh, config, model, objective, _pairs(mesh, config), reference=True), useful)


def _ppo(mesh: Mesh, config: ppo.Config, model: ModelConfig):
    params = {"policy": _parameters(mesh, model), "value": _parameters(mesh, model, head=True)}
    with_head = forward_flops(model, config.data, config.batch_size)
    without = forward_flops(model, config.data, config.batch_size, vocabulary=False)
    # Sampling, reference and old policy; reward and old values; then both trained.
    useful = 3 * with_head + (1 + _scores(config)) * without
    useful += config.num_epochs * _passes(config) * (with_head + without)
    return (*_online(mesh, config, model, ppo.make_method(model, model, config), params), useful)


def _grpo(mesh: Mesh, config: grpo.Config, model: ModelConfig):
    with_head = forward_flops(model, config.data, config.batch_size)
    without = forward_flops(model, config.data, config.batch_size, vocabulary=False)
    useful = 3 * with_head + _scores(config) * without + config.num_epochs * _passes(config) * with_head
    return (*_online(mesh, config, model, grpo.make_method(model, config), _parameters(mesh, model)), useful)


def _scores(config: Any) -> bool:
    """Whether a reward model scores; else a verifier does, on the host."""
    return config.reward == "model"


def _online(mesh: Mesh, config: Any, model: ModelConfig, method: online.Method, params: Any):
    """One iteration: sampling, the reward, what an update holds constant, the updates.

    Where rounds of sampling are allowed, all of them are counted. With adapters the reward model is one too, and the
    base of all is the reference.
    """
    settings = config.lora.settings
    reference = _parameters(mesh, model)
    # Without adapters nothing that samples or scores reads the base.
    base = {} if settings is None else reference
    policy = method.policy_of(params)
    policy, params = (_trained(mesh, config, model, roles) for roles in (policy, params))
    reward = _trained(mesh, config, model, _parameters(mesh, model, head=True))

    def whole(trained, base):
        return trained if settings is None else adapters.attach(trained, base, settings)

    def sample(policy, base, tokens, token_mask, key):
        policy = whole(policy, base)
        return generate(model, policy, tokens, token_mask, key, sampling=config.sampling, eos_id=1, pad_id=0)

    def score(reward, base, rollout):
        return rewards.score(model, whole(reward, base), rollout)

    def prepare(params, reference, scored, beta):
        return method.prepare(whole(params, reference), reference, scored, beta)

    rollout = _rollout(mesh, config)
    scores = _rows(mesh, jax.ShapeDtypeStruct((config.batch_size,), jnp.float32))
    beta = _rows(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    prepared = (params, reference, ScoredRollout(rollout=rollout, scores=scores), beta)
    batch, _ = jax.eval_shape(prepare, *prepared)
    part = config.batch_size // config.num_minibatches
    batch = _rows(mesh, jax.tree.map(lambda x: jax.ShapeDtypeStruct((part, *x.shape[1:]), x.dtype), batch))
    runs = config.num_epochs * config.num_minibatches
    frozen = online.frozen_of(method, params, reference)
    update, state = _update(mesh, config, model, method.objective, params, frozen, batch, runs)
    prompts = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, config.data.prompt_length), x.dtype),
        (rollout.tokens, rollout.token_mask),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=meshes.replicated(mesh))
    rounds = getattr(config, "rounds", 1)
    sampling = Work(
        name="sampling",
        function=jax.jit(sample),
        arguments=(policy, base, *_rows(mesh, prompts), key),
        runs=rounds,
        resident=(policy, base),
    )
    scoring = Work(
        name="reward",
        function=jax.jit(score),
        arguments=(reward, base, rollout),
        runs=rounds,
        resident=(reward, base),
    )
    advantages = Work(
        name="advantages", function=jax.jit(prepare), arguments=prepared, resident=(params, reference)
    )
    if not _scores(config):
        return [sampling, advantages, update], (state, reference)
    return [sampling, scoring, advantages, update], (state, reference, reward)


def _rollout(mesh: Mesh, config: Any) -> Rollout:
    sequences = _demonstrations(config.data, config.batch_size)
    log_probs = jax.ShapeDtypeStruct(sequences.response_mask.shape, jnp.float32)
    rollout = Rollout(
        tokens=sequences.tokens,
        token_mask=sequences.token_mask,
        response_mask=sequences.response_mask,
        log_probs=log_probs,
        policy_log_probs=log_probs,
        terminated=jax.ShapeDtypeStruct((config.batch_size,), bool),
        policy_step=jax.ShapeDtypeStruct((), jnp.int32),
    )
    return _rows(mesh, rollout)


def forward_flops(model: ModelConfig, data: Any, rows: int, *, vocabulary: bool = True) -> float:
    """FLOPs of a forward pass: two a weight and token, attention over half the square, the head on responses."""
    width, length = model.width, data.prompt_length + data.response_length
    attended = model.num_heads * model.head_dim
    kernels = 2 * width * attended + 2 * width * model.num_kv_heads * model.head_dim
    kernels += (3 if model.gated_mlp else 2) * width * model.mlp_width
    layer = 2.0 * kernels * length + 2.0 * length * length * attended
    head = 2.0 * model.vocab_size * width * data.response_length if vocabulary else 0.0
    return rows * (model.num_layers * layer + head)


_BUILDERS: dict[str, Callable[[Mesh, Any, ModelConfig], tuple[list[Work], Any, float]]] = {
    "sft": _sft,
    "reward_model": _reward_model,
    "dpo": _dpo,
    "ppo": _ppo,
    "grpo": _grpo,
}
