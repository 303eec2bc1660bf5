"""Prints the XPK command that runs one command on every machine of a TPU slice, and starts it again when it fails.

    python -m experiments.pod.xpk --name=sft8b --topology=v5e:4x4 --cluster=pods \\
        --image=us-docker.pkg.dev/p/r/rlhf_jax:1 -- \\
        python -m experiments.sft --workdir=gs://b/sft8b --mesh=fsdp:16 > sft8b.sh
    bash sft8b.sh

XPK (https://github.com/AI-Hypercomputer/xpk) makes the JobSet, on a cluster of its own making. XPK could attach
a bucket to the workload; this command attaches none: the run lives in a bucket by its URL, and the image holds the
extras tpu and gcs. The command replaces the shell that XPK starts it with, so that the signal before a preemption
reaches it; stopped and not done it ends with status 75, and XPK starts again what ends so.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from absl import flags

from experiments.pod import request, slices

CLUSTER = flags.DEFINE_string("cluster", None, "Cluster that `xpk cluster create` has made.", required=True)


def create(
    *,
    name: str,
    where: slices.Slice,
    cluster: str,
    image: str,
    command: Sequence[str],
    zone: str = "",
    project: str = "",
    restarts: int = 20,
    spot: bool = False,
    grace_seconds: int = 300,
) -> list[str]:
    """The words of ``xpk workload create``.

    Args:
      name: of the workload.
      where: the slice.
      cluster: of XPK.
      image: of the container; used as it is.
      command: what each machine runs; its words arrive as they are.
      zone: of Google Cloud; empty: gcloud's own.
      project: of Google Cloud; empty: gcloud's own.
      restarts: of the whole job.
      spot: whether a cluster that provisions nodes itself is to take spot ones.
      grace_seconds: between SIGTERM and SIGKILL.

    Raises:
      InputError: a name that Kubernetes does not take.
    """
    request.check_name(name)
    options = {
        "workload": name,
        "cluster": cluster,
        "tpu-type": where.accelerator_type,
        "docker-image": image,
        "env": "=".join(request.UNFINISHED),
        "max-restarts": str(restarts),
        "termination-grace-period-seconds": str(grace_seconds),
        "zone": zone,
        "project": project,
        "command": shlex.join(["exec", *command]),
    }
    words = [f"--{option}={value}" for option, value in options.items() if value]
    # XPK takes any status of a command for a mistake in it, also 75 and that of a lost machine's neighbours.
    return [
        "xpk",
        "workload",
        "create",
        *words,
        "--restart-on-user-code-failure",
        *(["--spot"] if spot else []),
    ]


def _text(arguments: Sequence[str]) -> str:
    where = slices.parse(request.TOPOLOGY.value)
    words = create(
        name=request.NAME.value,
        where=where,
        cluster=CLUSTER.value,
        image=request.IMAGE.value,
        command=request.command_of(arguments, where, mounted=False),
        zone=request.ZONE.value,
        project=request.PROJECT.value,
        restarts=request.RESTARTS.value,
        spot=request.SPOT.value,
        grace_seconds=request.GRACE.value,
    )
    return " \\\n  ".join([shlex.join(words[:3]), *map(shlex.quote, words[3:])]) + "\n"


if __name__ == "__main__":
    request.run(_text, needs=(request.IMAGE,), takes=(request.ZONE, request.PROJECT, request.GRACE))
