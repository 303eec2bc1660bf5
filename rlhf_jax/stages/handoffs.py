"""Models as stages start from them and leave them: hand-offs, Hugging Face, adapters on a base. Imports all below.

A reward model of several objectives has a head for each; ``<run>:<objective>`` is one of them as a model by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from rlhf_jax import __version__, checkpoints, storage
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, huggingface
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import adapters
from rlhf_jax.stages.config import differences
from rlhf_jax.stages.run_directory import Run, identity, is_run, split_objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a stage starts from it: shape, params (with a ``head`` where it has one), tokenizer, origin.

    adapter: of one that is an adapter on another's params, what was trained (see ``stages.adapters``); else None.
    """

    config: ModelConfig
    params: Any
    tokenizer: Any
    origin: str
    facts: Mapping[str, Any]
    adapter: Any = None

    @property
    def fingerprint(self) -> str:
        return tokenizers.fingerprint(self.tokenizer)


def load_model(path: str, run: Run) -> Model:
    """A model from a finished run's hand-off or from Hugging Face, read straight onto its place on the run's mesh.

    Args:
      path: either kind of directory, or the name of a repository on the Hugging Face hub, which is fetched;
        ``<run>:<objective>`` is one head of a reward model with several.
      run: gives the mesh.

    Raises:
      InputError: neither kind, unfinished, damaged, or of an architecture that is not supported.
    """
    path, objective = split_objective(path)
    directory = storage.at(path)
    if is_run(directory):
        return of_objective(load_handoff_model(path, run.mesh), objective)
    if storage.in_bucket(directory):
        raise InputError(
            f"there is no run at {path}, and Hugging Face directories are read from disks; give the --workdir of a "
            "finished run, or copy the model here (gcloud storage cp -r)"
        )
    if not directory.is_dir():
        try:
            directory = huggingface.local_directory(path)
        except InputError as error:
            raise InputError(
                f"there is no directory {path}; give the --workdir of a finished run, or a Hugging Face directory "
                f"({error})"
            ) from None
    config = huggingface.read_config(directory)
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    config, params = huggingface.from_pretrained(directory, shardings=place(run.mesh, config, shapes))
    tokenizer = tokenizers.load_tokenizer(directory)
    tokenizers.check_vocabulary(tokenizer, config.vocab_size, model=str(path))
    return Model(config=config, params=params, tokenizer=tokenizer, origin=str(path), facts={})


def load_start(path: str, run: Run) -> Model:
    """What a stage starts from, or samples: `load_model`, with one decoder.

    Raises:
      InputError: see ``load_model``; or an ensemble.
    """
    model = load_model(path, run)
    if "ensemble_offsets" in model.facts:
        raise InputError(
            f"{path} is an ensemble of {len(model.facts['ensemble_offsets'])} reward models, which has no one decoder "
            "to start from; give the run that its members started from"
        )
    return model


def load_handoff_model(path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model that a finished run left, its params in their place on ``mesh`` (None: the default device).

    Raises:
      InputError: no run, unfinished, or damaged.
    """
    directory = storage.at(path)
    if not is_run(directory):
        raise InputError(f"{directory} is not the directory of a run; give the --workdir of a finished one")
    handoff, location = checkpoints.load_handoff(directory)
    with storage.readable(location / "tokenizer") as tokenizer_directory:
        tokenizer = tokenizers.load_tokenizer(tokenizer_directory)
    if tokenizers.fingerprint(tokenizer) != handoff.tokenizer_fingerprint:
        raise InputError(
            f"{location}/tokenizer is not the tokenizer that {location}/handoff.json names; restore it"
        )
    config = ModelConfig.from_dict(handoff.model)
    places = None if mesh is None else functools.partial(place, mesh, config)
    return Model(
        config=config,
        params=checkpoints.restore_params(location, places),
        tokenizer=tokenizer,
        origin=str(directory),
        facts=handoff.facts,
    )


def load_beside(path: str, run: Run, base: Model, options: adapters.LoraOptions) -> Model:
    """A model as an adapter on ``base``, whose arrays it shares, where it was made as one; else one of its own.

    Args:
      path: see ``load_model``.
      run: gives the mesh.
      base: what the run starts from.
      options: the run's; with rank 0 nothing is shared.

    Raises:
      InputError: see ``load_model``; or an adapter on another base, or of another size or place.
    """
    directory, objective = split_objective(path)
    if not options.rank or not is_run(storage.at(directory)):
        return load_model(path, run)
    handoff, location = checkpoints.load_handoff(directory)
    if not checkpoints.has_adapter(location):
        return load_model(path, run)
    if handoff.facts["base"] != identity(base.origin):
        raise InputError(
            f"{path} is an adapter on {handoff.facts['base']['path']}, and this run's base is {base.origin}; start "
            "both from the same, or give lora.rank 0"
        )
    found = differences(handoff.config["lora"], json.loads(json.dumps(dataclasses.asdict(options))))
    if found:
        raise InputError(
            f"the adapter of {path} is another than this run's (config.lora: {'; '.join(found)})"
        )
    config = ModelConfig.from_dict(handoff.model)
    places = functools.partial(place, run.mesh, config)
    adapter = checkpoints.restore_params(location, places, name=checkpoints.ADAPTER)
    beside = Model(
        config=config,
        params=adapters.attach(adapter, base.params, options.settings),
        tokenizer=base.tokenizer,
        origin=directory,
        facts=handoff.facts,
        adapter=adapter,
    )
    return of_objective(beside, objective)


def place(mesh: jax.sharding.Mesh, config: ModelConfig, params: Any) -> Any:
    """Where each parameter lives (see ``sharding.parameter_sharding``); what has to stay whole is logged."""
    for whole in sharding.whole_axes(mesh, config, params):
        logging.warning("%s", whole)
    return sharding.parameter_sharding(mesh, config, params)


def of_objective(model: Model, objective: str) -> Model:
    """One head of several as a reward model by itself; the model as it is where none is named.

    Raises:
      InputError: the model has no such head.
    """
    if not objective:
        return model
    number = place_of(model, objective)
    head = jax.tree.map(lambda x: x[number], model.params["head"])
    facts = {
        name: value for name, value in model.facts.items() if name not in ("objectives", "reward_offsets")
    }
    return dataclasses.replace(
        model,
        params={**model.params, "head": head},
        adapter=None if model.adapter is None else {**model.adapter, "head": head},
        origin=f"{model.origin}:{objective}",
        facts={**facts, "reward_offset": model.facts["reward_offsets"][number]},
    )


def place_of(model: Model, objective: str) -> int:
    """Which head of several an objective has.

    Raises:
      InputError: none.
    """
    objectives = model.facts.get("objectives", ())
    if objective not in objectives:
        heads = f"heads for {', '.join(objectives)}" if objectives else "no heads with names"
        raise InputError(
            f"there is no {model.origin}:{objective}: the model of {model.origin} has {heads}; give one that it has, "
            "or leave the name out"
        )
    return objectives.index(objective)


def objectives_of(path: str) -> tuple[str, ...]:
    """The heads of the reward model that a finished run left, by name; none where it has one, or is no such run."""
    if not is_run(storage.at(path)) or not checkpoints.is_finished(path):
        return ()
    return tuple(checkpoints.facts_of(path).get("objectives", ()))


def check_same_family(first: Model, second: Model, *, architecture: bool = False) -> None:
    """Refuses two models that do not speak the same tokens (or, on request, differ in architecture).

    Raises:
      InputError: says what differs.
    """
    if first.fingerprint != second.fingerprint:
        raise InputError(
            f"the tokenizers of {first.origin} and {second.origin} differ "
            f"({first.fingerprint[:12]} and {second.fingerprint[:12]}); start both from the same SFT run"
        )
    found = differences(first.config.to_dict(), second.config.to_dict()) if architecture else []
    if found:
        raise InputError(f"the models of {first.origin} and {second.origin} differ ({'; '.join(found)})")


def check_scores(
    model: Model, *, steps: bool = False, several: bool = False, flag: str = "reward_from"
) -> None:
    """Refuses a model that is no reward model, or one of responses where one of ``steps`` is needed, and vice versa;
    and one with a head for each of several objectives, where ``several`` are not meant.

    Raises:
      InputError: names its directory.
    """
    stage = "process_reward" if steps else "reward_model"
    if "head" not in model.params:
        raise InputError(f"--{flag}={model.origin} has no reward head; give a run of experiments.{stage}")
    if steps != ("step_mark" in model.facts):
        made = "responses" if steps else "steps"
        raise InputError(
            f"--{flag}={model.origin} is a reward model of {made}; give a run of experiments.{stage}, or "
            f"--config.reward={'model' if steps else 'process'} where the stage has it"
        )
    if not several:
        check_one_head(model, flag=flag)


def check_one_head(model: Model, *, flag: str = "run") -> None:
    """Refuses a reward model with a head for each of several objectives.

    Raises:
      InputError: names its heads.
    """
    objectives = model.facts.get("objectives", ())
    if objectives:
        choices = " or ".join(f"{model.origin}:{name}" for name in objectives)
        raise InputError(
            f"--{flag}={model.origin} has a head for each of {', '.join(objectives)}, and one is needed here; give "
            f"{choices}"
        )


def check_context(model: Model, needed: int) -> None:
    """Refuses rows of ``needed`` tokens (prompt and response widths) that the model was not made for.

    Raises:
      InputError: names both lengths.
    """
    if needed > model.config.max_length:
        raise InputError(
            f"config.data.prompt_length + response_length is {needed}, beyond the context of {model.origin} "
            f"({model.config.max_length} tokens); lower one of them"
        )


def leave_handoff(
    run: Run,
    config: Any,
    model: Model,
    trained: adapters.Trained,
    *,
    made_from: Sequence[str],
    facts: Mapping,
) -> None:
    """Marks the run finished by leaving its params, tokenizer and description.

    An adapter is left twice: merged into the params, which any stage and ``export`` take, and by itself, for stages
    that keep one base (``load_beside``).
    """
    params = trained.params
    if trained.adapter is not None:
        params = adapters.merge(trained.adapter, model.params, config.lora.settings)
        facts = {**facts, "base": identity(model.origin)}
    checkpoints.save_handoff(
        run.workdir,
        checkpoints.Handoff(
            stage=run.stage,
            model=model.config.to_dict(),
            tokenizer_fingerprint=model.fingerprint,
            config=dataclasses.asdict(config),
            made_from=list(made_from),
            facts=dict(facts),
            code_version=__version__,
        ),
        params,
        lambda path: tokenizers.save_tokenizer(model.tokenizer, path),
        adapter=trained.adapter,
    )
