"""A run in a bucket: the real clients of Cloud Storage against a server of this machine (see ``fake_bucket``)."""

import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints, metrics, storage
from rlhf_jax.checkpoints import Checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import handoffs, run_directory
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.optimizer import OptimizerConfig

from .test_checkpoints import HANDOFF, PARAMS, numbers, restore, save_steps, state_of


def test_a_place_is_a_directory_or_a_folder_of_a_bucket(monkeypatch):
    assert storage.at("runs/sft") == pathlib.Path("runs/sft") and not storage.in_bucket(storage.at("runs"))
    for refused in ("s3://bucket/run", "file:///tmp/run", pathlib.Path("gs://bucket/run")):
        with pytest.raises(InputError, match=r"is a URL, and here a directory is needed .* gcsfuse"):
            storage.at(refused)
    for refused in ("gs://bucket", "gs://bucket/", "gs://", "gs:///run", "gs://Bucket/run"):
        with pytest.raises(InputError, match=f"{refused} names no folder of a bucket; give one, as gs://"):
            storage.at(refused)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gcsfs is not installed: pip install 'rlhf_jax\[gcs\]', or mount"):
        storage.at("gs://bucket/run")


def test_files_of_a_bucket(bucket):
    place = storage.at(f"{bucket.url}/run/")
    assert storage.in_bucket(place) and str(place) == f"{bucket.url}/run" and not place.exists()
    storage.replace(place / "a.json", "{}")
    storage.replace(place / "a.json", "größer")
    with storage.writable(place / "deep") as directory:
        directory.mkdir()
        (directory / "b").write_bytes(b"123456789")
    # The check value of CRC-32C (RFC 3720, B.4, of "123456789") is 0xe3069283.
    assert storage.files(place)["deep/b"] == "4waSgw=="
    assert set(storage.files(place)) == {"a.json", "deep/b"}
    with storage.readable(place) as directory:
        assert (directory / "deep" / "b").read_bytes() == b"123456789"
        assert (directory / "a.json").read_text(encoding="utf-8") == "größer"
    storage.remove(place)
    storage.remove(place)
    assert not bucket.objects and storage.files(place) == {}


def test_the_newest_bundle_comes_back_exactly_and_old_ones_go(bucket):
    run = f"{bucket.url}/run"
    assert restore(run) is None
    batches = save_steps(run, [1, 2, 4])
    step, state, host, batch = restore(run)
    assert step == 4 and host == {"pending": {"sums": {"x": [0.1, 4]}}}
    np.testing.assert_array_equal(state["w"], np.full((4, 3), 4, np.float32))
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(jax.random.key(4)).tolist()
    np.testing.assert_array_equal(batch, batches[4])
    kept = {name.split("/")[2] for name in bucket.objects}
    assert kept == {"2", "2.crc32c.json", "4", "4.crc32c.json"}


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign", "no digests, cut"])
def test_a_damaged_bundle_is_named_and_the_one_before_it_used(damage, bucket, caplog):
    run = f"{bucket.url}/run"
    save_steps(run, [2, 3])
    arrays = [name for name in bucket.objects if name.startswith("run/checkpoints/3/state/")]
    largest = max(arrays, key=lambda name: len(bucket.objects[name].content))
    if damage == "missing":
        bucket.remove(largest)
    if damage == "foreign":
        bucket.write("run/checkpoints/3/state/0.0.0", b"of another run")
    if damage.startswith("no digests"):
        bucket.remove("run/checkpoints/3.crc32c.json")
    if damage.endswith("cut"):
        for name in arrays:
            bucket.write(name, bucket.objects[name].content[: len(bucket.objects[name].content) // 2])
    step, state, *_ = restore(run)
    assert step == 2 and float(state["w"][0, 0]) == 2.0
    assert f"{run}/checkpoints/3 is damaged" in caplog.text
    assert any(name.startswith("run/checkpoints/damaged.3/state/") for name in bucket.objects)
    assert not any(name.startswith("run/checkpoints/3/") for name in bucket.objects)
    save_steps(run, [3])
    assert restore(run)[0] == 3, "the step can be saved again"


def test_killed_at_any_write_of_a_save_the_newest_whole_checkpoint_is_there(bucket):
    """What a process that is killed leaves is what the bucket held after some change: here after each."""
    run = f"{bucket.url}/run"
    save_steps(run, [1])
    before = len(bucket.log)
    saver, iterator = Checkpoints(run), numbers()
    saver.save(2, state_of(2), iterator, {"pending": {}})
    saver.close()
    log, found = list(bucket.log), []
    for changes in range(before, len(log) + 1):
        bucket.log = list(log)
        bucket.go_back(changes)
        step, state, *_ = restore(run)
        assert float(state["w"][0, 0]) == step
        found.append(step)
    committed = next(i for i, (name, _) in enumerate(log) if name == "run/checkpoints/2/commit_success.txt")
    assert found == [1] * (committed + 1 - before) + [2] * (len(log) - committed)
    # In the middle of it: the same step is saved over what is there.
    bucket.log = list(log)
    bucket.go_back((before + committed) // 2)
    saver, iterator = Checkpoints(run), numbers()
    saver.save(2, state_of(7), iterator, {"pending": {}})
    saver.close()
    step, state, *_ = restore(run)
    assert (step, float(state["w"][0, 0])) == (2, 7.0)


def save_tokenizer(path):
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")


def leave(run, save=save_tokenizer):
    return checkpoints.save_handoff(run, HANDOFF, jax.tree.map(jax.numpy.asarray, PARAMS), save)


def test_a_handoff_is_there_once_its_last_object_is_and_lands_on_any_mesh(bucket):
    run = f"{bucket.url}/run"
    with pytest.raises(InputError, match="there is no run at gs://.*/run; give the --workdir of a finished"):
        checkpoints.load_handoff(run)
    path = leave(run)
    assert checkpoints.load_handoff(run) == (HANDOFF, path)
    for sharding in (None, meshes.replicated(meshes.data_mesh())):
        params = checkpoints.restore_params(path, sharding)
        jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    # Killed at any moment of it, and run again.
    log = list(bucket.log)
    for changes in range(1, len(log)):
        bucket.log = list(log)
        bucket.go_back(changes)
        assert not checkpoints.is_finished(run), log[changes - 1][0]
        with pytest.raises(InputError, match="has left no hand-off yet; run its stage to the end first"):
            checkpoints.load_handoff(run)
    checkpoints.load_handoff(leave(run).parent)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(path), PARAMS)


def test_a_handoff_that_was_tampered_with_is_refused(bucket):
    run = f"{bucket.url}/run"
    leave(run)
    bucket.write("run/handoff/tokenizer/tokenizer.json", b"{ }")
    with pytest.raises(InputError, match=r"tokenizer/tokenizer.json does not match its SHA-256\); run that"):
        checkpoints.load_handoff(run)


def test_a_handoff_goes_from_a_bucket_to_a_disk_and_back(bucket, tmp_path):
    """As ``gcloud storage cp -r`` copies it: what identifies it and what guards it are of its content."""
    leave(f"{bucket.url}/run")
    with storage.readable(storage.at(f"{bucket.url}/run")) as copy:
        storage.upload(copy, storage.at(f"{bucket.url}/again"))
        for run in (copy, f"{bucket.url}/again"):
            found, path = checkpoints.load_handoff(run)
            assert found == HANDOFF
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(path), PARAMS)
            assert checkpoints.handoff_identity(run) == checkpoints.handoff_identity(f"{bucket.url}/run")


def test_a_handoff_that_came_through_a_mount_is_read_by_its_url(bucket, tmp_path):
    """gcsfuse leaves an empty object that ends in a slash for every directory of a flat bucket."""
    leave(tmp_path / "run")
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        name = str(path.relative_to(tmp_path))
        bucket.write(f"{name}/" if path.is_dir() else name, b"" if path.is_dir() else path.read_bytes())
    run = storage.at(f"{bucket.url}/run")
    assert "run/handoff/tokenizer/" in bucket.objects
    assert set(storage.files(run)) == set(storage.files(tmp_path / "run"))
    with storage.readable(run / "handoff" / "tokenizer") as directory:
        assert [path.name for path in directory.iterdir()] == ["tokenizer.json"]
    found, path = checkpoints.load_handoff(run)
    assert found == HANDOFF
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(path), PARAMS)


# fsspec uploads once more where a file that it could not write is collected, and is refused again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_bucket_refuses_is_said_in_a_sentence(bucket):
    run = f"{bucket.url}/run"
    save_steps(run, [1])
    bucket.refuse = ("checkpoints/2/commit_success",)
    saver, iterator = Checkpoints(run), numbers()
    with pytest.raises(InputError, match=r"cannot save step 2 in gs://.*; step 1 is saved there; make room"):
        saver.save(2, state_of(2), iterator, {})
        saver.wait()
    with pytest.raises(InputError, match="cannot save step 2"):
        saver.close()
    bucket.refuse += ("handoff/",)
    with pytest.raises(InputError, match=r"cannot leave the hand-off gs://.*/run/handoff: "):
        leave(run)
    writer = metrics.MetricsWriter(storage.at(run), start_step=-1)
    bucket.refuse += ("metrics.jsonl",)
    with pytest.raises(InputError, match=r"cannot write gs://.*/run/metrics.jsonl: .*may not write"):
        writer.flush()
    bucket.refuse = bucket.refuse[:1]
    writer.close()
    assert restore(run)[0] == 1


def test_access_that_is_lost_during_a_save_is_said_in_a_sentence(bucket):
    run = f"{bucket.url}/run"
    save_steps(run, [1])
    saver, iterator = Checkpoints(run), numbers()
    bucket.lost = True
    with pytest.raises(
        InputError,
        match=r"cannot save step 2 in gs://.*may not use .*; what is saved there cannot be seen; make room or mend",
    ):
        saver.save(2, state_of(2), iterator, {})
        saver.wait()
    bucket.lost = False
    saver.close()
    assert restore(run)[0] == 1


def test_a_bucket_without_access_is_said_in_a_sentence(bucket):
    workdir, start = f"{bucket.url}/run", f"{bucket.url}/start"
    leave(start)
    bucket.lost = True

    def open_it(**inputs):
        config, stop = OptimizerConfig(), StopRequest()
        return run_directory.open_run(
            workdir, "sft", config, inputs=inputs, parallelism="jit", mesh=None, stop=stop
        )

    refused = r": Forbidden: .*may not use .*; give this account access to it, or mend the disk, then run"
    for read, place in (
        (lambda: open_it(init_from=start), start),
        (lambda: open_it(reward_from=f"{start}:brief"), start),
        (lambda: checkpoints.load_handoff(start), f"{start}/handoff"),
        (lambda: checkpoints.is_finished(start), f"{start}/handoff/handoff.json"),
        (lambda: handoffs.load_handoff_model(start), start),
        (lambda: Checkpoints(workdir), f"{workdir}/checkpoints"),
    ):
        with pytest.raises(InputError, match=f"^cannot read {place}{refused}"):
            read()
    with pytest.raises(InputError, match=f"cannot write to workdir {workdir}: Forbidden.*; give a writable"):
        open_it()


def rows(run) -> list[int]:
    return [row["step"] for row in metrics.read_metrics(storage.at(run) / "metrics.jsonl")]


def test_rows_of_metrics_are_in_the_bucket_by_the_time_of_a_checkpoint(bucket, monkeypatch):
    run = f"{bucket.url}/run"
    writer = metrics.MetricsWriter(storage.at(run), start_step=-1)
    writer.write(1, {"loss": 0.5})
    assert rows(run) == [1], "the first row is seen at once"
    writer.write(2, {"loss": 0.5})
    assert rows(run) == [1]
    writer.flush()
    assert rows(run) == [1, 2]
    there = len(bucket.log)
    writer.write(3, {"loss": 0.25})
    writer.close()
    # As if killed before the end: the row of step 3 is lost, as is the step. A second start goes on from 2.
    bucket.go_back(there)
    writer = metrics.MetricsWriter(storage.at(run), start_step=2)
    writer.write(3, {"loss": 0.125})
    monkeypatch.setattr(metrics, "_SECONDS_UNSENT", 0.0)
    writer.write(4, {"loss": 0.125})
    assert rows(run) == [1, 2, 3, 4], "nobody has to wait for a checkpoint longer than that"
    writer.close()
    assert json.loads(bucket.objects["run/metrics.jsonl"].content.splitlines()[2]) == {
        "step": 3,
        "loss": 0.125,
    }
    events = [name for name in bucket.objects if name.startswith("run/tensorboard/events")]
    assert len(events) >= 1 and all(len(bucket.objects[name].content) > 0 for name in events)
