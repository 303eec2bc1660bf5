"""Prints a shell script that asks for a TPU slice, waits, runs one command on it, and asks again when it is taken.

    python -m experiments.pod.queued_resource --name=sft8b --topology=v5e:4x4 --zone=us-west4-a --bucket=b --spot -- \\
        python -m experiments.sft --workdir=/bucket/sft8b --mesh=fsdp:16 > sft8b.sh
    bash sft8b.sh

Run the script where the checkout is, on a machine that stays, with gcloud logged in. It ends with the command's
success, and hands the slice back; a command that was stopped before it was done ends with status 75, which is none.
Stopped itself, it can be started again: it goes on with the slice that it finds.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from experiments.pod import request, slices


def script(
    *,
    name: str,
    where: slices.Slice,
    zone: str,
    bucket: str,
    command: Sequence[str],
    project: str = "",
    restarts: int = 20,
    spot: bool = False,
) -> str:
    """The script, for bash.

    Args:
      name: of the queued resource and of the TPU.
      where: the slice.
      zone: of Google Cloud.
      bucket: of Cloud Storage, which gcsfuse mounts at ``request.MOUNT``.
      command: what each machine runs, in the checkout's copy there.
      project: of Google Cloud; empty: gcloud's own.
      restarts: how often the command is started again.
      spot: whether the slice may be taken back.

    Raises:
      InputError: a name that Google Cloud does not take.
    """
    request.check_name(name)
    request.check_bucket(bucket)
    place = f"--zone={shlex.quote(zone)}" + (f" --project={shlex.quote(project)}" if project else "")
    # What a machine's shell reads; quoted once more for the shell that sends it.
    stopped = f"export {'='.join(request.UNFINISHED)}"
    remote = f"cd rlhf_jax && {stopped} && {shlex.join(['exec', *command])}"
    return f"""#!/usr/bin/env bash
# {where.accelerator_type} ({where.topology}, {where.hosts} machines of {where.chips_of_a_host} chips).
set -euo pipefail

name={shlex.quote(name)}
place=({place})
restarts={restarts}
command={shlex.quote(remote)}
# Expanded by the shell of each machine, not by this one.
# shellcheck disable=SC2016
mount={shlex.quote(_mount(bucket))}

state() {{
  gcloud compute tpus queued-resources describe "$name" "${{place[@]}}" --format='value(state.state)' 2>/dev/null \\
    || echo ABSENT
}}

give_back() {{
  gcloud compute tpus queued-resources delete "$name" "${{place[@]}}" --force --quiet
}}

on_every_machine() {{
  gcloud compute tpus tpu-vm ssh "$name" "${{place[@]}}" --worker=all --command="$1"
}}

install() {{
  git archive --format=tar.gz --prefix=rlhf_jax/ -o "/tmp/$name.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "/tmp/$name.tar.gz" "$name:" "${{place[@]}}" --worker=all
  # What is still running there is of a run that lost a machine, and holds the chips. The images' own Python is too old.
  on_every_machine "pkill -f 'experiments[.]'; tar xzf $name.tar.gz && python3 -m pip install --quiet --user uv \\
    && ~/.local/bin/uv venv --quiet --clear --python 3.12 venv \\
    && ~/.local/bin/uv pip install --quiet --python venv/bin/python -e 'rlhf_jax[tpu,gcs]' && $mount"
}}

runs=0
while true; do
  case "$(state)" in
    ABSENT)
      gcloud compute tpus queued-resources create "$name" "${{place[@]}}" --node-id="$name" \\
        --accelerator-type={where.accelerator_type} --runtime-version={where.version.runtime}{" --spot" if spot else ""}
      ;;
    ACTIVE)
      if [ "$runs" -gt "$restarts" ]; then
        echo "error: $name failed $runs times; read its output above, then run this again" >&2
        exit 1
      fi
      runs=$((runs + 1))
      if install && on_every_machine ". venv/bin/activate && $command"; then
        give_back
        exit 0
      fi
      echo "$name: run $runs ended before it was done" >&2
      sleep 30
      ;;
    SUSPENDED | FAILED)
      give_back
      ;;
    *)
      sleep 30
      ;;
  esac
done
"""


def _mount(bucket: str) -> str:
    """For a machine's shell: gcsfuse, where there is none yet, from Google's packages; then the bucket in its place."""
    options = " ".join(f"--{option}" for option in request.MOUNT_OPTIONS)
    key, packages = "/usr/share/keyrings/cloud.google.asc", "https://packages.cloud.google.com/apt"
    return (
        f"(command -v gcsfuse || (sudo curl -sSfo {key} {packages}/doc/apt-key.gpg"
        f' && echo "deb [signed-by={key}] {packages} gcsfuse-$(lsb_release -cs) main"'
        " | sudo tee /etc/apt/sources.list.d/gcsfuse.list"
        " && sudo apt-get update -q && sudo apt-get install -qy gcsfuse))"
        f" && sudo install -d -o $(id -u) {request.MOUNT}"
        f" && (mountpoint -q {request.MOUNT} || gcsfuse {options} {bucket} {request.MOUNT})"
    )


def _text(arguments: Sequence[str]) -> str:
    where = slices.parse(request.TOPOLOGY.value)
    return script(
        name=request.NAME.value,
        where=where,
        zone=request.ZONE.value,
        bucket=request.BUCKET.value,
        command=request.command_of(arguments, where),
        project=request.PROJECT.value,
        restarts=request.RESTARTS.value,
        spot=request.SPOT.value,
    )


if __name__ == "__main__":
    request.run(_text, needs=(request.ZONE, request.BUCKET), takes=(request.PROJECT,))
