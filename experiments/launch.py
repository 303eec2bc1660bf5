"""What every main shares: how a run starts, and how it ends when something is wrong. Imports stages."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from rlhf_jax import storage
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.parallel import hosts
from rlhf_jax.training.interrupt import Interrupted, StopRequest, stop_on_signals

CONFIGS = pathlib.Path(__file__).parent / "configs"
# Of the environment: the exit status of a run that was stopped on request and is not done; 0 where it is not given.
INTERRUPTED_STATUS = "RLHF_JAX_INTERRUPTED_STATUS"


# Flags that name a directory of this machine to write.
_WRITTEN = ("to", "output")


def define_config(name: str) -> flags.FlagHolder:
    """``--config=<file.py>``, by default ``experiments/configs/<name>.py``; fields change by ``--config.a.b=value``."""
    try:
        return _define_config(str(CONFIGS / f"{name}.py"))
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        # ml_collections applies --config.a.b=value here, at import, and raises what it likes.
        reason = " ".join(str(error).split())
        return _stop_with(f"--config: {reason}; --help lists the fields, and a value has its default's type")


def _define_config(default: str) -> flags.FlagHolder:
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "A Python file with get_config(). Any field can be set on the command line: "
        "--config.optimizer.learning_rate=1e-4. "
        "The file's docstring gives the command, the time it takes and the number to expect.",
    )


def define_workdir() -> flags.FlagHolder:
    return flags.DEFINE_string(
        "workdir",
        None,
        "Directory of this run, or of a stage also gs://bucket/folder: config.json, metrics.jsonl, tensorboard/, "
        "checkpoints/ and, when done, handoff/. "
        "Run the same command again to resume; a finished run is left as it is; a directory of another config is "
        "refused.",
        required=True,
    )


def define_parallelism() -> flags.FlagHolder:
    return flags.DEFINE_enum(
        "parallelism",
        "jit",
        ["jit", "pmap"],
        "How an update runs on many devices: jit with shardings, or pmap with replicas. The update is the same.",
    )


def define_distributed() -> flags.FlagHolder:
    return flags.DEFINE_boolean(
        "distributed",
        False,
        "This process is one of several that run this command, on hosts that share --workdir. Cloud TPU, SLURM and "
        "Kubernetes say which; elsewhere set JAX_COORDINATOR_ADDRESS=<host of the first>:<port>, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID.",
    )


def define_mesh() -> flags.FlagHolder:
    return flags.DEFINE_string(
        "mesh",
        "",
        "How devices are laid out, as in --mesh=data:2,fsdp:4,tensor:2: data splits rows, fsdp rows and parameters, "
        "tensor heads and hidden units; the sizes multiply to the number of devices. Empty: all on data. The update is "
        "the same, and a run goes on with another mesh.",
    )


def define_init_from(what: str) -> flags.FlagHolder:
    return flags.DEFINE_string("init_from", None, what, required=True)


def define_reward_from() -> flags.FlagHolder:
    return flags.DEFINE_string(
        "reward_from",
        "",
        "Run directory of the reward model, the frozen reward (and PPO's first value model), where --config.reward is "
        "'model'; of a process reward model where it is 'process'. Several reward models with commas between them, or "
        "one with several heads (of which <run>:<objective> names one): --config.scoring.weights adds them up, or "
        "--config.constraint.at_least keeps the second up.",
    )


def define_held_out_reward_from() -> flags.FlagHolder:
    return flags.DEFINE_string(
        "held_out_reward_from",
        "",
        "Run directory of a reward model that is measured at every evaluation and never optimised; "
        "--config.stop_when.measure=held_out ends the run when it no longer improves.",
    )


def define_judge_from() -> flags.FlagHolder:
    return flags.DEFINE_string(
        "judge_from",
        "",
        "Run directory of a language model, or a Hugging Face directory, which compares responses to a prompt where "
        "--config.reward is 'judge'; --config.judge.principle says by what.",
    )


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A frozen config dataclass as the ConfigDict that flags can override."""
    return ml_collections.ConfigDict(to_fields(config))


def to_fields(config: Any) -> dict[str, Any]:
    """Name -> value of a frozen config dataclass, nested ones too; a None becomes a placeholder of the field's type.

    ml_collections gives a plain None no type, and then lets no flag override it.
    """
    hints, fields = typing.get_type_hints(type(config)), {}
    for name in hints:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = to_fields(value)
        elif value is None:
            (kind,) = set(typing.get_args(hints[name])) - {type(None)}
            value = ml_collections.config_dict.placeholder(kind)
        fields[name] = value
    return fields


def describe(config: type) -> str:
    """Every field of a config dataclass, nested ones too, as flags with their defaults, under the class's own words."""
    return _describe_value(config, config(), "--config")


def _describe_value(kind: type, value: Any, prefix: str) -> str:
    hints = typing.get_type_hints(kind)
    plain = [name for name in hints if not dataclasses.is_dataclass(hints[name])]
    lines = [f"{prefix}.*: {inspect.cleandoc(kind.__doc__)}", ""]
    lines += [f"    {prefix}.{name}={getattr(value, name)}" for name in plain] + [""]
    lines += [_describe_value(hints[n], getattr(value, n), f"{prefix}.{n}") for n in hints if n not in plain]
    return "\n".join(lines)


def launch(main: Callable[[StopRequest], None], config: type | None = None) -> None:
    """Runs ``main`` under absl with what a person at a shell expects; ``--help`` lists the fields of ``config``.

    Exit status: 0 when done, and after Ctrl-C or SIGTERM once everything is saved (there another where the environment
    has ``INTERRUPTED_STATUS``, for schedulers that would take 0 for done); 2 with one sentence on standard error where
    something given cannot be used.
    """

    def absl_main(argv: list[str]) -> None:
        if len(argv) > 1:
            _stop_with(f"unexpected argument {argv[1]!r}; options start with --, see --help")
        logging.set_verbosity(logging.WARNING)
        enable_compilation_cache()
        distributed = "distributed" in flags.FLAGS and flags.FLAGS.distributed
        try:
            interrupted_status = _interrupted_status()
            for name in _WRITTEN:
                if name in flags.FLAGS:
                    storage.local_path(flags.FLAGS[name].value)
            if distributed:
                hosts.join()
            with stop_on_signals() as stop:
                main(stop)
        except InputError as error:
            _end(f"error: {error}", 2, at_once=distributed)
        except Interrupted as interrupted:
            _end(str(interrupted), interrupted_status, at_once=False)
        except Exception as error:
            if not distributed:
                raise
            _end(_of_a_lost_process(error) or traceback.format_exc(), 1, at_once=True)

    if config is not None:
        module = sys.modules["__main__"]
        fields = "Fields and the library's defaults (the config file may set others):"
        module.__doc__ = f"{module.__doc__}\n{fields}\n\n{describe(config)}"
    # absl lists the flags of the main module alone under --help; those defined here belong there too.
    for name in ("config", "workdir", "init_from", "parallelism", "mesh", "distributed"):
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.run(absl_main, flags_parser=_parse_flags)


def _interrupted_status() -> int:
    text = os.environ.get(INTERRUPTED_STATUS, "0")
    if not text.isdecimal() or int(text) > 255:
        raise InputError(f"{INTERRUPTED_STATUS}={text!r}; give a whole number from 0 to 255")
    return int(text)


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl does; but a config file that is not there, an OSError once it is used, is said in a sentence too."""
    try:
        rest = app.parse_flags_with_usage(argv)
        if "config" in flags.FLAGS:  # not every main has one
            flags.FLAGS["config"].value.to_dict()
    except (OSError, AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        _stop_with(f"--config cannot be loaded: {reason}; give a Python file as those in {CONFIGS}")
    return rest


def enable_compilation_cache() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/rlhf_jax."""
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        pathlib.Path.home() / ".cache" / "rlhf_jax"
    )
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def print_report(workdir: str) -> None:
    """Writes a run's report and prints where it lies; of several processes the first one does."""
    if hosts.is_main():
        print(report.write_report(workdir))


def _of_a_lost_process(error: Exception) -> str | None:
    """The sentence for an error that says that another process is gone, or None for any other."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not re.search(
        "gloo|connection|heartbeat|unavailable|barrier", reason, re.IGNORECASE
    ):
        return None
    return (
        f"error: process {jax.process_index()} of {jax.process_count()} has lost another one of this job ({reason}); "
        "what is saved is whole: run the same command again on every host"
    )


def _end(message: str, status: int, *, at_once: bool) -> None:
    """``at_once``: without waiting for other processes, which wait for this one and are to learn that it is gone."""
    print(message, file=sys.stderr, flush=True)
    if at_once:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _stop_with(message: str) -> None:
    _end(f"error: {message}", 2, at_once=False)
