"""What a pod is asked for with: the manifest's structure, and the script run against a gcloud that only answers."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

from experiments import launch
from experiments.pod import jobset, queued_resource, request, slices
from rlhf_jax.errors import InputError

COMMAND = ["python", "-m", "experiments.sft", "--workdir=/bucket/run", "--config.optimizer.schedule=it's"]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator_type"),
    [
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v5e:4x8", 8, 4, "v5litepod-32"),
        ("v6e:2x2", 1, 4, "v6e-4"),
        ("v5p:4x4x8", 32, 4, "v5p-256"),
        ("v4:2x2x2", 2, 4, "v4-16"),
    ],
)
def test_machines_of_a_slice(topology, hosts, chips, accelerator_type):
    found = slices.parse(topology)
    assert (found.hosts, found.chips_of_a_host, found.accelerator_type) == (hosts, chips, accelerator_type)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:3x3"])
def test_a_slice_that_is_none(topology):
    with pytest.raises(InputError, match=f"--topology={topology}"):
        slices.parse(topology)


def test_the_manifest_asks_for_every_machine_of_the_slice():
    where = slices.parse("v5e:4x8")
    text = jobset.manifest(
        name="run-1", where=where, image="image:1", bucket="runs", command=COMMAND, spot=True, restarts=7
    )
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run-1"
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (1, 8, 8, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["command"] == COMMAND
    assert container["env"] == [{"name": launch.INTERRUPTED_STATUS, "value": "75"}]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [request.MOUNT]
    (volume,) = pod["volumes"]
    assert volume["name"] == container["volumeMounts"][0]["name"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "runs",
        "mountOptions": "implicit-dirs,rename-dir-limit=200000",
    }
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    tpus = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": tpus, "limits": tpus}


def test_several_machines_find_each_other_and_one_does_not_look():
    assert request.command_of(COMMAND, slices.parse("v5e:4x8")) == [*COMMAND, "--distributed"]
    assert request.command_of(COMMAND, slices.parse("v5e:2x4")) == COMMAND
    on_bucket = ["python", "-m", "experiments.sft", "--workdir=gs://runs/sft"]
    assert request.command_of(on_bucket, slices.parse("v5e:4x8")) == [*on_bucket, "--distributed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no command"),
        (["python", "run.py", "--workdir=/tmp/run"], "--workdir=/tmp/run would be lost"),
        (["python", "run.py", "--workdir", "runs/1"], "--workdir=runs/1 would be lost"),
    ],
)
def test_a_command_that_a_pod_cannot_run(arguments, message):
    with pytest.raises(InputError, match=message):
        request.command_of(arguments, slices.parse("v5e:4x8"))


@pytest.mark.parametrize("name", ["Run", "run_1", "1run", "run-", "r" * 41])
def test_a_name_that_the_cloud_does_not_take(name):
    with pytest.raises(InputError, match="--name="):
        jobset.manifest(
            name=name, where=slices.parse("v5e:4x8"), image="image", bucket="runs", command=COMMAND
        )


@pytest.mark.parametrize("bucket", ["gs://runs", "runs/sft", "r", "runs; rm"])
def test_a_bucket_that_is_none(bucket):
    with pytest.raises(InputError, match=f"--bucket={bucket}: give the bucket's name alone"):
        request.check_bucket(bucket)


# Answers what a test wrote down: states one after the other; the command runs, in a shell of a machine's own.
GCLOUD = """#!/usr/bin/env bash
echo "$@" >> calls
take() { line=$(head -1 "$1"); sed -i 1d "$1"; echo "$line"; }
case "$*" in
  *describe*) line=$(take states); [ "$line" != ABSENT ] || exit 1; echo "$line" ;;
  *experiments.sft*) for word; do case "$word" in --command=*) bash -c "${word#--command=}" ;; esac; done ;;
esac
"""
# Python on such a machine: a run ends as a test wrote down, and stopped on request as experiments.launch does.
PYTHON = """#!/usr/bin/env bash
result=$(head -1 ../results); sed -i 1d ../results
case "$result" in
  ok) exit 0 ;;
  stopped) exit "${RLHF_JAX_INTERRUPTED_STATUS:-0}" ;;
  *) exit 1 ;;
esac
"""


def _run(tmp_path, *, states, results, restarts=20):
    text = queued_resource.script(
        name="run-1",
        where=slices.parse("v5e:4x8"),
        zone="here-1",
        bucket="runs",
        command=COMMAND,
        spot=True,
        restarts=restarts,
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    nothing = "#!/bin/sh\n"
    for name, body in {"gcloud": GCLOUD, "python": PYTHON, "sleep": nothing, "git": nothing}.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    (tmp_path / "rlhf_jax").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "results").write_text("\n".join(results) + "\n")
    (tmp_path / "run.sh").write_text(text)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "run.sh"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, (tmp_path / "calls").read_text().splitlines()


def test_the_script_waits_runs_and_gives_the_slice_back(tmp_path):
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    done, calls = _run(tmp_path, states=states, results=["ok"])
    assert done.returncode == 0, done.stderr
    (create,) = [call for call in calls if "queued-resources create" in call]
    assert "--accelerator-type=v5litepod-32" in create and "--spot" in create and "--zone=here-1" in create
    (ran,) = [call for call in calls if "experiments.sft" in call]
    # The apostrophe arrives as it was given.
    # The bucket is mounted by then.
    mount = "gcsfuse --implicit-dirs --rename-dir-limit=200000 runs /bucket"
    assert any(mount in call for call in calls[: calls.index(ran)])
    words = shlex.split(ran.partition("--command=")[2].partition("exec ")[2])
    assert words == COMMAND and "--worker=all" in ran
    assert "queued-resources delete" in calls[-1]


@pytest.mark.parametrize("how", ["lost", "stopped"])
def test_the_script_asks_again_when_the_slice_was_taken(how, tmp_path):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE"]
    done, calls = _run(tmp_path, states=states, results=[how, "ok"])
    assert done.returncode == 0, done.stderr
    kinds = [word for call in calls for word in ("create", "delete", "experiments.sft") if word in call]
    assert kinds == ["experiments.sft", "delete", "create", "experiments.sft", "delete"]


def test_the_script_does_not_start_a_broken_command_for_ever(tmp_path):
    done, calls = _run(tmp_path, states=["ACTIVE"] * 5, results=["no"] * 5, restarts=2)
    assert done.returncode == 1 and "failed 3 times" in done.stderr
    assert sum("experiments.sft" in call for call in calls) == 3
    # Somebody will want to look at the machines.
    assert not any("delete" in call for call in calls)


@pytest.mark.parametrize(
    ("main", "required"), [("jobset", "--image=image:1"), ("queued_resource", "--zone=here-1")]
)
def test_the_mains(main, required):
    def run(*arguments):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                f"experiments.pod.{main}",
                "--name=run-1",
                "--bucket=runs",
                required,
                *arguments,
            ],
            cwd=pathlib.Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run("--topology=v5e:4x4", "--", *COMMAND)
    assert done.returncode == 0 and "experiments.sft" in done.stdout, done.stderr
    refused = run("--topology=v5e:banana", "--", *COMMAND)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: --topology=v5e:banana: v5e slices have 2 axes; give it as v5e:4x4\n"
