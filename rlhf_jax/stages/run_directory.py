"""The directory of one run: its config, its inputs, what it printed and left. Imports checkpoints, models and data."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm
from absl import logging

from rlhf_jax import __version__, checkpoints, storage
from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.batches import EncodeReport
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import written
from rlhf_jax.models import decoder, huggingface, tensor_files
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import adapters
from rlhf_jax.stages.config import differences
from rlhf_jax.storage import Path
from rlhf_jax.training.interrupt import StopRequest


class Purpose(enum.IntEnum):
    """What a stage's key is folded with; every draw comes from one of them and then an iteration, a row, a position."""

    INIT = 0
    TRAIN = 1
    EVALUATION = 2
    ROLLOUT = 3
    SHUFFLE = 4
    DATA = 5
    ALARM = 6
    ADAPTER = 7
    SCALE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and what it runs on.

    workdir: its directory. stage: its stage's name. mesh, parallelism: see ``parallel.mesh``. stop: set by Ctrl-C,
    SIGTERM.
    """

    workdir: Path
    stage: str
    mesh: jax.sharding.Mesh
    parallelism: meshes.Parallelism
    stop: StopRequest

    @property
    def finished(self) -> bool:
        return checkpoints.is_finished(self.workdir)

    @property
    def share(self) -> pipeline.Share:
        """What this process reads of every batch."""
        return pipeline.Share(process_index=jax.process_index(), process_count=jax.process_count())

    def key(self, seed: int, purpose: Purpose) -> jax.Array:
        """The typed key of one purpose of this stage; no other stage or purpose of the same seed has it."""
        stage = jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.stage.encode()))
        return jax.random.fold_in(stage, purpose)

    def data_seed(self, seed: int) -> int:
        """The seed of this stage's shuffling, which NumPy does: a whole number below 2**32."""
        return int(jax.random.bits(self.key(seed, Purpose.DATA)))


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


def open_run(
    workdir: str | os.PathLike,
    stage: str,
    config: Any,
    *,
    inputs: Mapping[str, str],
    parallelism: meshes.Parallelism,
    mesh: jax.sharding.Mesh | None,
    stop: StopRequest,
) -> Run:
    """Makes or re-enters a run directory; ``config.json`` in it says what the run is.

    ``mesh``: None puts all devices on the data axis. It is no part of what the run is: another may go on with it.

    Raises:
      InputError: the directory or an input is a URL of no bucket; an input cannot be read; the directory cannot be
        written, or belongs to a run with another config or other inputs; or the mesh splits parameters, which ``pmap``
        does not.
    """
    mesh = meshes.data_mesh() if mesh is None else mesh
    meshes.check_parallelism(mesh, parallelism)
    workdir = storage.at(workdir)
    description = {
        "stage": stage,
        "config": dataclasses.asdict(config),
        "inputs": {name: _identity(path) for name, path in inputs.items()},
    }
    description = json.loads(json.dumps(description))  # tuples as the file will have them
    hosts.decided_by_main(functools.partial(_enter, workdir, description))
    return Run(workdir=workdir, stage=stage, mesh=mesh, parallelism=parallelism, stop=stop)


def _enter(workdir: Path, description: dict[str, Any]) -> None:
    """Makes the directory and says in it what the run is, or checks that it is this one."""
    path = workdir / "config.json"
    try:
        storage.make_directory(workdir)
        found = differences(_description(path), description) if path.exists() else []
        # A run that was refused before it trained has nothing to lose: its config may be mended in place.
        if found and any((workdir / name).exists() for name in _RESULTS):
            raise InputError(
                f"workdir {workdir} belongs to a run with another config ({'; '.join(found)}); "
                "give another --workdir, or the config it was started with"
            )
        storage.replace(path, json.dumps(description, indent=1))
    except Exception as error:
        problem = storage.problem(error)
        if problem is None:
            raise
        raise InputError(f"cannot write to workdir {workdir}: {problem}; give a writable one") from error


def _identity(path: str) -> dict[str, str | None]:
    """Where an input lies and what it was: an input that was made anew is another input. A hub name stays one."""
    place = storage.at(path)
    with storage.reached(place):
        where = str(storage.absolute(place)) if place.exists() else path
        return {"path": where, "handoff": checkpoints.handoff_identity(path) or _weights(place)}


def _weights(place: Path) -> str | None:
    """What identifies a Hugging Face directory, which lies on this machine."""
    return None if storage.in_bucket(place) else tensor_files.fingerprint(place)


def changed_inputs(workdir: Path) -> list[str]:
    """Names of the inputs of a run whose hand-offs are no longer those it was made from."""
    inputs = _description(workdir / "config.json")["inputs"]
    return [name for name, was in inputs.items() if _identity(was["path"])["handoff"] != was["handoff"]]


# What there is to lose in a run's directory.
_RESULTS = ("checkpoints", "handoff", "summary.json", "scores.npz")


def _description(path: Path) -> dict[str, Any]:
    """What ``config.json`` of a run's directory says.

    Raises:
      InputError: it is no run's, as in a Hugging Face directory.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); give another --workdir, or restore it") from None
    if not isinstance(description, dict) or "stage" not in description:
        raise InputError(f"{path} is not of a run of this project; give a new or an empty --workdir")
    return description


def load_model(path: str, run: Run) -> Model:
    """A model from a finished run's hand-off or from Hugging Face, read straight onto its place on the run's mesh.

    Args:
      path: either kind of directory, or the name of a repository on the Hugging Face hub, which is fetched.
      run: gives the mesh.

    Raises:
      InputError: neither kind, unfinished, damaged, or of an architecture that is not supported.
    """
    directory = storage.at(path)
    if _is_run(directory):
        return load_handoff_model(path, run.mesh)
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


def place(mesh: jax.sharding.Mesh, config: ModelConfig, params: Any) -> Any:
    """Where each parameter lives (see ``sharding.parameter_sharding``); what has to stay whole is logged."""
    for whole in sharding.whole_axes(mesh, config, params):
        logging.warning("%s", whole)
    return sharding.parameter_sharding(mesh, config, params)


def load_handoff_model(path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model that a finished run left, its params in their place on ``mesh`` (None: the default device).

    Raises:
      InputError: no run, unfinished, or damaged.
    """
    directory = storage.at(path)
    if not _is_run(directory):
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
    if not options.rank or not _is_run(storage.at(path)):
        return load_model(path, run)
    handoff, location = checkpoints.load_handoff(path)
    if not checkpoints.has_adapter(location):
        return load_model(path, run)
    if handoff.facts["base"] != _identity(base.origin):
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
    return Model(
        config=config,
        params=adapters.attach(adapter, base.params, options.settings),
        tokenizer=base.tokenizer,
        origin=str(path),
        facts=handoff.facts,
        adapter=adapter,
    )


def _is_run(directory: Path) -> bool:
    """Whether a directory was written by a run, finished or not."""
    with storage.reached(directory):
        if any((directory / name).exists() for name in _RESULTS):
            return True
    try:
        return "stage" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


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


def check_scores(model: Model, *, steps: bool = False, flag: str = "reward_from") -> None:
    """Refuses a model that is no reward model, or one of responses where one of ``steps`` is needed, and vice versa.

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
        facts = {**facts, "base": _identity(model.origin)}
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


def write_data_report(run: Run, unreadable: Sequence[tuple[str, str]], **encoded: EncodeReport) -> None:
    """Keeps what was left out of the data or cut, and why, where the report finds it."""
    if not hosts.is_main():
        return
    value = {name: dataclasses.asdict(report) for name, report in encoded.items()}
    path = run.workdir / "data.json"
    with written(path):
        storage.replace(path, json.dumps({"unreadable": list(unreadable), **value}, indent=1))


class Progress:
    """A bar with the quantities that matter; a plain line every ``line_every`` steps when not a terminal.

    Called with (finished steps, values of this step); ``tokens`` among the values gives tokens/s. Of several processes
    the first one shows it.
    """

    def __init__(self, stage: str, num_steps: int, shown: Sequence[str], *, line_every: int):
        self._shown, self._line_every, self._num_steps, self._stage = shown, line_every, num_steps, stage
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=num_steps, desc=stage, disable=not (self._terminal and hosts.is_main()), dynamic_ncols=True
        )
        self._started, self._first, self._tokens = time.monotonic(), None, 0.0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._first is None:
            # The first step compiles; counting starts after it.
            self._started, self._first, self._tokens = time.monotonic(), step, -values["tokens"]
        self._tokens += values["tokens"]
        elapsed = time.monotonic() - self._started
        texts = {name: f"{values[name]:.3g}" for name in self._shown if name in values}
        if step > self._first:
            texts["tokens/s"] = f"{self._tokens / elapsed:,.0f}"
        self._bar.set_postfix(texts, refresh=False)
        self._bar.update(step - self._bar.n)
        if (
            hosts.is_main()
            and not self._terminal
            and (step % self._line_every == 0 or step == self._num_steps)
        ):
            left = elapsed / max(step - self._first, 1) * (self._num_steps - step)
            line = " ".join(f"{name} {text}" for name, text in texts.items())
            print(
                f"{self._stage} {step}/{self._num_steps} {line} left {left:.0f}s", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        self._bar.close()
