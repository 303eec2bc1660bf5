"""Checkpoints come back exactly or are named as damaged; a hand-off appears whole or not at all."""

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.checkpoints import Checkpoints, Handoff, find_damage
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes


def numbers() -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(10).seed(3).shuffle().repeat(5).batch(3)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def state_of(value: float):
    return {"w": jnp.full((4, 3), value), "step": jnp.int32(value), "key": jax.random.key(int(value))}


def save_steps(workdir: pathlib.Path, steps) -> list[np.ndarray]:
    """Saves at the given steps, one batch a step; returns the batches of all steps and of one more."""
    saver, iterator, seen = Checkpoints(workdir), numbers(), []
    for step in range(1, max(steps) + 1):
        seen.append(next(iterator))
        if step in steps:
            saver.save(step, state_of(step), iterator, {"pending": {"sums": {"x": [0.1, step]}}})
    saver.close()
    return [*seen, next(iterator)]


def restore(workdir: pathlib.Path):
    """(step, state, host, the next batch), or None."""
    saver, iterator = Checkpoints(workdir), numbers()
    try:
        found = saver.restore_newest(state_of(0), iterator)
    finally:
        saver.close()
    return found and (*found, next(iterator))


def sha256_of_files(directory: pathlib.Path) -> dict[str, str]:
    return {
        os.path.relpath(os.path.join(folder, name), directory): hashlib.sha256(
            pathlib.Path(folder, name).read_bytes()
        ).hexdigest()
        for folder, _, names in os.walk(directory)
        for name in names
    }


def test_the_newest_bundle_comes_back_exactly_and_old_ones_go(tmp_path):
    assert restore(tmp_path) is None
    batches = save_steps(tmp_path, [1, 2, 4])
    step, state, host, batch = restore(tmp_path)
    assert step == 4
    np.testing.assert_array_equal(state["w"], np.full((4, 3), 4, np.float32))
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(jax.random.key(4)).tolist()
    assert host == {"pending": {"sums": {"x": [0.1, 4]}}}
    np.testing.assert_array_equal(batch, batches[4])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["2", "2.sha256.json", "4", "4.sha256.json"]
    for step in ("2", "4"):
        digests = json.loads((tmp_path / "checkpoints" / f"{step}.sha256.json").read_text())
        assert digests == sha256_of_files(tmp_path / "checkpoints" / step)


@pytest.mark.parametrize("damage", ["cut", "digests", "no digests, cut", "foreign file", "foreign folder"])
def test_a_damaged_bundle_is_named_and_the_one_before_it_used(damage, tmp_path, caplog):
    save_steps(tmp_path, [2, 3])
    folder = tmp_path / "checkpoints"
    if "cut" in damage:
        for file in (folder / "3" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if damage == "digests":
        (folder / "3.sha256.json").write_text("{")
    if damage.startswith("no digests"):  # as after a kill between a save and its digests
        (folder / "3.sha256.json").unlink()
    if damage == "foreign file":
        (folder / "3" / "state" / "0.0.0").write_bytes(b"of another run")
    if damage == "foreign folder":
        shutil.rmtree(folder / "3")
        (folder / "3.sha256.json").unlink()
        other = tmp_path / "other"
        saver = Checkpoints(other)
        saver.save(3, {"another": jnp.ones(3)}, numbers(), {})
        saver.close()
        (other / "checkpoints" / "3").rename(folder / "3")
        (folder / "notes.sha256.json").write_text("not ours, and no step's")
    step, state, *_ = restore(tmp_path)
    assert step == 2 and float(state["w"][0, 0]) == 2.0
    assert any(f"{folder / '3'} is damaged" in record.getMessage() for record in caplog.records)
    assert (folder / "damaged.3" / "state").exists(), "nothing is deleted"
    save_steps(tmp_path, [3])
    assert restore(tmp_path)[0] == 3, "the step can be saved again"


def test_a_step_saved_anew_has_digests_of_its_own(tmp_path):
    """Somebody removes a checkpoint by hand, and leaves the digests beside it."""
    save_steps(tmp_path, [2, 3])
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert restore(tmp_path)[0] == 2
    saver = Checkpoints(tmp_path)
    saver.save(3, state_of(7), numbers(), {"pending": {}})
    saver.close()
    step, state, *_ = restore(tmp_path)
    assert (step, float(state["w"][0, 0])) == (3, 7.0)


def test_a_bundle_holds_what_was_so_when_it_was_saved_however_late_it_is_written(tmp_path, monkeypatch):
    """A loop counts on in the very dict that it has handed over, and a busy disk writes when it can."""
    handler, counted_on = checkpoints.ocp.JsonCheckpointHandler, threading.Event()
    write = handler._save_fn

    async def write_late(*args):
        assert counted_on.wait(60)
        await write(*args)

    monkeypatch.setattr(handler, "_save_fn", write_late)
    saver, iterator, sums = Checkpoints(tmp_path), numbers(), {"x": [5.0, 1.0]}
    saver.save(1, state_of(1), iterator, {"pending": {"sums": sums}})
    sums["x"] = [11.0, 2.0]
    next(iterator)
    counted_on.set()
    saver.close()
    step, _, host, batch = restore(tmp_path)
    assert (step, host) == (1, {"pending": {"sums": {"x": [5.0, 1.0]}}})
    np.testing.assert_array_equal(batch, next(numbers()))


def test_what_one_process_cannot_read_no_process_reads(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, [2, 3])
    answers = iter([(1,), (0,)])
    monkeypatch.setattr(checkpoints.hosts, "largest", lambda flag: next(answers))
    assert restore(tmp_path)[0] == 2
    assert "3 is damaged (another process of this job cannot read it)" in caplog.text


def test_a_checkpoint_that_fails_without_a_word_is_passed_over(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, [2, 3])
    restore_step = checkpoints.ocp.CheckpointManager.restore

    def fail_at_three(manager, step, **more):
        if step == 3:
            raise AssertionError
        return restore_step(manager, step, **more)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", fail_at_three)
    assert restore(tmp_path)[0] == 2
    assert "3 is damaged (AssertionError)" in caplog.text


FULL = """
import json, pathlib, sys
import grain, jax.numpy as jnp, numpy as np
from rlhf_jax.checkpoints import Checkpoints
from rlhf_jax.errors import InputError

def rng(step):
    return np.random.default_rng(step).random(150_000, np.float32)

saver, said = Checkpoints(pathlib.Path(sys.argv[1])), []
dataset = grain.MapDataset.range(10).repeat(5).batch(3).to_iter_dataset(grain.ReadOptions(num_threads=0))
try:
    for step in (1, 2, 3, 4):
        saver.save(step, {"w": jnp.asarray(rng(step))}, iter(dataset), {})
except InputError as error:
    said.append(str(error))
try:
    saver.close()
except InputError as error:
    said.append(str(error))
found = Checkpoints(pathlib.Path(sys.argv[1])).restore_newest({"w": jnp.zeros(150_000)}, iter(dataset))
print(json.dumps([said, found[0], bool((found[1]["w"] == rng(found[0])).all())]))
"""


def test_a_full_disk_stops_in_a_sentence_and_the_last_checkpoint_stays_whole(tmp_path):
    """On a real file system of 1.5 MB, which a private name space of the kernel lends."""
    private = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1500k none "$0" && exec "$@"',
        str(tmp_path),
    ]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("this machine lends no private file system: unshare -Urm mount -t tmpfs")
    child = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    finished = subprocess.run([*private, *child], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    said, step, same = json.loads(finished.stdout)
    kept = (
        f"cannot save step {step + 1} in .*: No space left on device; step {step} is saved there; make room"
    )
    assert step >= 1 and same
    assert len(said) >= 1 and all(re.search(kept, sentence) for sentence in said), said


@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_a_save_that_the_disk_refuses_is_an_error_at_the_next_look(when, tmp_path, monkeypatch):
    saver, iterator = Checkpoints(tmp_path), numbers()
    saver.save(1, state_of(1), iterator, {})
    saver.wait()
    refused = OSError(errno.EDQUOT, "Disk quota exceeded")

    def refuse(*_, **__):
        raise refused

    at_once = when == "at once"
    monkeypatch.setattr(saver._manager, "save" if at_once else "wait_until_finished", refuse)
    expected = (
        r"cannot save step 2 in .*: Disk quota exceeded; step 1 is saved there; make room or mend the disk"
    )
    with pytest.raises(InputError, match=expected):
        saver.save(2, state_of(2), iterator, {})
        while True:
            saver.check()
    monkeypatch.undo()
    saver.close()
    assert restore(tmp_path)[0] >= 1


def test_find_damage(tmp_path):
    files, digests = tmp_path / "files", tmp_path / "digests.json"
    (files / "deep").mkdir(parents=True)
    (files / "a").write_bytes(b"first")
    (files / "deep" / "b").write_bytes(b"second")
    assert find_damage(files, digests) is None, "without digests nothing is known"
    digests.write_text(json.dumps(sha256_of_files(files)))
    assert find_damage(files, digests) is None
    (files / "stray").write_bytes(b"of another run")
    assert find_damage(files, digests) == "stray does not belong there"
    (files / "stray").unlink()
    (files / "deep" / "b").write_bytes(b"secone")
    assert find_damage(files, digests) == "deep/b does not match its SHA-256"
    (files / "deep" / "b").unlink()
    assert find_damage(files, digests) == "deep/b is missing"
    digests.write_text('{"a": ')
    assert find_damage(files, digests) == "digests.json is not JSON"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to workdir .*file.*; give a writable one"):
        Checkpoints(tmp_path / "file")


@pytest.mark.parametrize("path", ["s3://bucket/run", pathlib.Path("gs://bucket/run"), "file:///tmp/run"])
def test_a_url_is_refused_and_no_directory_is_named_after_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for touch in (
        Checkpoints,
        checkpoints.load_handoff,
        checkpoints.is_finished,
        checkpoints.handoff_identity,
    ):
        with pytest.raises(InputError, match=r"is a URL, .* gcsfuse\), and give the path there"):
            touch(path)
    assert not list(tmp_path.iterdir())


HANDOFF = Handoff(
    stage="sft",
    model={"width": 3},
    tokenizer_fingerprint="f",
    config={"seed": 0},
    made_from=["fresh weights"],
    facts={"eval_perplexity": 2.5},
    code_version="0",
)
PARAMS = {"decoder": {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.float32(0.5)}}


def leave(workdir, save_tokenizer=None):
    save = save_tokenizer or (lambda path: (path.mkdir(), (path / "tokenizer.json").write_text("{}")))
    return checkpoints.save_handoff(workdir, HANDOFF, jax.tree.map(jnp.asarray, PARAMS), save)


def test_a_handoff_says_what_was_left_and_lands_on_any_mesh(tmp_path):
    path = leave(tmp_path)
    assert checkpoints.is_finished(tmp_path) and checkpoints.load_handoff(tmp_path) == (HANDOFF, path)
    assert not (tmp_path / "handoff.partial").exists()
    for sharding in (None, meshes.replicated(meshes.data_mesh())):
        params = checkpoints.restore_params(path, sharding)
        jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
        assert len(params["decoder"]["w"].sharding.device_set) == (8 if sharding else 1)


@pytest.mark.parametrize("where", ["in the tokenizer", "before the rename"])
def test_a_crash_leaves_no_handoff_and_the_next_run_leaves_a_whole_one(where, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "before the rename":
            patch.setattr(checkpoints.os, "rename", crash)
        leave(tmp_path, crash if where == "in the tokenizer" else None)
    assert not checkpoints.is_finished(tmp_path)
    with pytest.raises(InputError, match="has left no hand-off yet; run its stage to the end first"):
        checkpoints.load_handoff(tmp_path)
    assert checkpoints.load_handoff(leave(tmp_path).parent)[0] == HANDOFF


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer/tokenizer.json", "{ }", "tokenizer/tokenizer.json does not match its SHA-256"),
        ("digests.json", "{", "digests.json is not JSON"),
        ("handoff.json", '{"stage": "sft"', "handoff.json is not the description of a hand-off"),
        ("handoff.json", '{"stage": "sft"}', "handoff.json is not the description of a hand-off"),
    ],
)
def test_a_handoff_that_was_tampered_with_is_refused(file, content, message, tmp_path):
    (leave(tmp_path) / file).write_text(content)
    with pytest.raises(InputError, match=f"{message}.*; run that stage again in a fresh workdir"):
        checkpoints.load_handoff(tmp_path)


def test_no_run_is_no_handoff(tmp_path):
    with pytest.raises(
        InputError, match=r"there is no run at .*nowhere; give the --workdir of a finished stage"
    ):
        checkpoints.load_handoff(tmp_path / "nowhere")
