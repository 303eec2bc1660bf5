"""What the mains of this folder share: which slice, under which name, for which command. Imports slices."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from experiments.pod import slices
from rlhf_jax.errors import InputError

NAME = flags.DEFINE_string("name", None, "Of the job; letters, digits and hyphens.", required=True)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice, as the planner takes it: v5e:4x8, v5p:4x4x8.", required=True
)
SPOT = flags.DEFINE_bool("spot", False, "Ask for machines that may be taken back at any time.")
# What is added to the command's environment: stopped and not done is then no success (75: sysexits.h, EX_TEMPFAIL).
UNFINISHED = ("RLHF_JAX_INTERRUPTED_STATUS", "75")

BUCKET = flags.DEFINE_string(
    "bucket",
    None,
    "Cloud Storage bucket, mounted at /bucket on every machine; --workdir lies there.",
    required=True,
)
# Where it is mounted: a run's directory has to stay when its machines go.
MOUNT = "/bucket"
RESTARTS = flags.DEFINE_integer(
    "restarts", 20, "How often a job that failed is started again; preemption is a failure.", lower_bound=0
)


def check_name(name: str) -> None:
    """Raises InputError unless ``name`` may name a Kubernetes object and a TPU."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(
            f"--name={name}: give at most 40 lower-case letters, digits and hyphens, a letter first and no hyphen last"
        )


def check_bucket(bucket: str) -> None:
    """Raises InputError unless ``bucket`` may name a Cloud Storage bucket."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise InputError(
            f"--bucket={bucket}: give the bucket's name alone, without gs:// and without a folder"
        )


def command_of(arguments: Sequence[str], where: slices.Slice) -> list[str]:
    """The command as every worker runs it, ``--distributed`` where there are several.

    Raises:
      InputError: there is none, or its working directory is one that only one machine sees.
    """
    if len(arguments) < 2:
        raise InputError(
            "there is no command; give it after --, as in -- python -m experiments.sft --workdir=/bucket/run"
        )
    workdirs = [
        argument.partition("=")[2] or (arguments[place + 1] if place + 1 < len(arguments) else "")
        for place, argument in enumerate(arguments)
        if re.fullmatch(r"--?workdir(=.*)?", argument)
    ]
    for workdir in workdirs:
        if not workdir.startswith(f"{MOUNT}/"):
            raise InputError(
                f"--workdir={workdir} would be lost with its machine; give a path where --bucket is mounted on all of "
                f"them, as {MOUNT}/run"
            )
    several = where.hosts > 1 and workdirs and "--distributed" not in arguments
    return [*arguments, "--distributed"] if several else list(arguments)


def run(text_of: Callable[[Sequence[str]], str]) -> None:
    """Prints ``text_of`` the arguments after ``--``; exit status 2 and one sentence where they cannot be used."""

    def main(argv: list[str]) -> None:
        try:
            print(text_of(argv[1:]), end="")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    # absl lists the flags of the main module alone under --help; these belong there too.
    for holder in (NAME, TOPOLOGY, SPOT, BUCKET, RESTARTS):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    app.run(main)
