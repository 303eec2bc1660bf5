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
    "",
    "Cloud Storage bucket, mounted at /bucket on every machine; --workdir lies there. For XPK none is attached.",
)
# Where it is mounted: a run's directory has to stay when its machines go.
MOUNT = "/bucket"
# How gcsfuse mounts it. A checkpoint and a hand-off become whole by the rename of a directory, which in a bucket with a
# flat namespace gcsfuse refuses unless it is told how many files it may move for one: by default none.
MOUNT_OPTIONS = ("implicit-dirs", "rename-dir-limit=200000")
RESTARTS = flags.DEFINE_integer(
    "restarts", 20, "How often a job that failed is started again; preemption is a failure.", lower_bound=0
)
# Of some of the mains; `run` refuses those that a main does not read.
IMAGE = flags.DEFINE_string("image", "", "Container image with rlhf_jax and its extras tpu and gcs.")
GRACE = flags.DEFINE_integer(
    "grace_seconds", 300, "Between SIGTERM and SIGKILL: what a save may take.", lower_bound=1
)
ZONE = flags.DEFINE_string("zone", "", "Google Cloud zone.")
PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; empty: gcloud's own.")
_OF_SOME = (BUCKET, IMAGE, GRACE, ZONE, PROJECT)


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


def command_of(arguments: Sequence[str], where: slices.Slice, *, mounted: bool = True) -> list[str]:
    """The command as every worker runs it, ``--distributed`` where there are several.

    ``mounted``: whether there is a bucket at ``MOUNT``; by its URL, gs://bucket/run, one is seen everywhere.

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
    places = ("gs://", f"{MOUNT}/") if mounted else ("gs://",)
    for workdir in workdirs:
        if not workdir.startswith(places):
            where_to = f"{MOUNT}/run, where --bucket is mounted, or " if mounted else ""
            raise InputError(
                f"--workdir={workdir} would be lost with its machine; give a place that all of them see: {where_to}"
                "gs://bucket/run"
            )
    several = where.hosts > 1 and workdirs and "--distributed" not in arguments
    return [*arguments, "--distributed"] if several else list(arguments)


def run(
    text_of: Callable[[Sequence[str]], str],
    *,
    needs: Sequence[flags.FlagHolder],
    takes: Sequence[flags.FlagHolder] = (),
) -> None:
    """Prints ``text_of`` the arguments after ``--``; exit status 2 and one sentence where they cannot be used.

    Of the flags that not every main reads, ``needs`` have to be given, ``takes`` may be, and others may not.
    """

    def main(argv: list[str]) -> None:
        try:
            for holder in needs:
                if not holder.value:
                    raise InputError(
                        f"--{holder.name} is missing; {holder.name}: {flags.FLAGS[holder.name].help}"
                    )
            read = {holder.name for holder in (*needs, *takes)}
            for holder in _OF_SOME:
                if holder.present and holder.name not in read:
                    raise InputError(f"--{holder.name} is not for this command; leave it away")
            print(text_of(argv[1:]), end="")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    # absl lists the flags of the main module alone under --help; these belong there too.
    for holder in (NAME, TOPOLOGY, SPOT, RESTARTS, *needs, *takes):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    app.run(main)
