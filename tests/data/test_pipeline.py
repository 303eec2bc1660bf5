"""The stream of batches is one and the same: resumed anywhere, shared by processes, made by workers, read from disk."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rlhf_jax.checkpoints import Checkpoints
from rlhf_jax.data import batches as b
from rlhf_jax.data import prepared, readers
from rlhf_jax.data.mixtures import Mixture
from rlhf_jax.data.pipeline import BatchIterator, Share
from rlhf_jax.data.world import WorldConfig, demonstrations, preferences, prompts, world_tokenizer
from rlhf_jax.errors import InputError

P, R = 16, 48
WIDTHS = {"prompt_length": P, "response_length": R}
WORLD = WorldConfig(seed=3, num_demonstrations=53, num_preferences=41, num_prompts=23)


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Prepared sets of the embedded world's rows, by kind, with the rows themselves."""
    folder = tmp_path_factory.mktemp("sets")
    rows = {
        "demonstrations": demonstrations(WORLD),
        "preferences": preferences(WORLD, "train"),
        "prompts": prompts(WORLD, "train"),
    }
    for kind in rows:
        lines = []
        for row in rows[kind]:
            fields = {
                name: value for name, value in dataclasses.asdict(row).items() if isinstance(value, str)
            }
            lines.append(json.dumps(fields))
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
        prepared.prepare(folder / f"{kind}.jsonl", kind, folder / kind)
    return {kind: (prepared.open_prepared(folder / kind), folder / f"{kind}.jsonl") for kind in rows}


@pytest.fixture(scope="module")
def lazy(sets, tokenizer):
    """Encoded rows of prepared sets."""
    return {
        "demonstrations": b.encode_demonstrations(sets["demonstrations"][0].rows, tokenizer, **WIDTHS)[0],
        "preferences": b.encode_preferences(sets["preferences"][0].rows, tokenizer, **WIDTHS)[0],
        "prompts": b.encode_prompts(sets["prompts"][0].rows, tokenizer, prompt_length=P)[0],
    }


PIPELINES = {
    "demonstrations": lambda lazy, **how: b.demonstration_batches(lazy["demonstrations"], **how),
    "preferences": lambda lazy, **how: b.preference_batches(lazy["preferences"], **how),
    "prompts": lambda lazy, **how: b.prompt_batches(lazy["prompts"], **how),
    "packed": lambda lazy, **how: b.packed_batches(lazy["demonstrations"], **how),
    "buckets": lambda lazy, **how: b.demonstration_batches(lazy["demonstrations"], num_buckets=3, **how),
    "mixture": lambda lazy, **how: b.demonstration_batches(mixed(lazy["demonstrations"]), **how),
}


def mixed(encoded):
    parts = (encoded.rows[:20], encoded.rows[20:])
    mixture = Mixture(parts=parts, weights=(3.0, 1.0))
    return dataclasses.replace(encoded, rows=mixture, sources=mixture.sources())


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, c in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == c.dtype
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stream_cut_at_twenty_random_points_is_the_uninterrupted_one(lazy, name):
    make = PIPELINES[name]
    uninterrupted = make(lazy, batch_size=4, seed=9)
    whole = [next(uninterrupted) for _ in range(60)]
    assert any(not np.array_equal(jax.tree.leaves(whole[0])[0], jax.tree.leaves(x)[0]) for x in whole[1:3])
    points = np.sort(np.random.default_rng(1).choice(np.arange(1, 60), 20, replace=False))
    position, state = 0, make(lazy, batch_size=4, seed=9).get_state()
    for point in [*points.tolist(), 60]:
        # A new process each time: nothing is left but the state, as JSON.
        resumed = make(lazy, batch_size=4, seed=9)
        resumed.set_state(json.loads(json.dumps(state)))
        while position < point:
            same(next(resumed), whole[position])
            position += 1
        state = resumed.get_state()


@pytest.mark.slow
def test_worker_processes_change_nothing_and_resume_in_the_middle(lazy):
    make = PIPELINES["packed"]
    alone = make(lazy, batch_size=2, seed=4)
    whole = [next(alone) for _ in range(12)]
    working = make(lazy, batch_size=2, seed=4, share=Share(num_workers=2))
    try:
        working.set_state({**alone.get_state(), "next_batch": 2})
        for expected in whole[2:5]:
            same(next(working), expected)
        state = working.get_state()  # workers are ahead of it
        assert state == {**alone.get_state(), "next_batch": 5}
    finally:
        working.close()
    assert not multiprocessing.active_children()
    # With another number of workers, or none, the same state goes on with the same batch.
    resumed = make(lazy, batch_size=2, seed=4)
    resumed.set_state(state)
    for expected in whole[5:]:
        same(next(resumed), expected)


KILLED = """
import multiprocessing, os, signal
from rlhf_jax.data import batches, pipeline, world

if __name__ == "__main__":
    rows = world.demonstrations(world.WorldConfig(num_demonstrations=40))
    encoded, _ = batches.encode_demonstrations(rows, world.world_tokenizer(), prompt_length=16, response_length=48)
    share = pipeline.Share(num_workers=1)
    iterator = batches.demonstration_batches(encoded, batch_size=4, seed=0, share=share)
    next(iterator), next(iterator)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)  # as Ctrl-C does
    for _ in range(20):  # more than there are ahead
        next(iterator)
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_worker_outlives_a_ctrl_c_and_not_its_run(tmp_path):
    if not pathlib.Path("/proc/self").exists():
        pytest.skip("no /proc to see processes in")
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py")]
    with (tmp_path / "out").open("w+") as out:  # no pipe, which the worker would hold open
        environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        done = subprocess.run(command, stdout=out, stderr=out, env=environment, timeout=120)
        out.seek(0)
        said = out.read()
    assert done.returncode == -signal.SIGKILL, said
    running = pathlib.Path("/proc") / said.split()[0] / "cmdline"
    deadline = time.monotonic() + 30
    while running.exists() and running.read_bytes():  # empty: ended, and nobody has asked how
        assert time.monotonic() < deadline, "the worker goes on without its run"
        time.sleep(0.1)


@pytest.mark.parametrize("name", PIPELINES)
def test_processes_share_every_batch_however_many_they_are(lazy, name):
    make = PIPELINES[name]
    whole = make(lazy, batch_size=4, seed=2)
    expected = [next(whole) for _ in range(9)]
    state, position = None, 0
    for count in (1, 4, 2):  # the number of processes changes twice in mid-run
        parts = [
            make(lazy, batch_size=4, seed=2, share=Share(process_index=i, process_count=count))
            for i in range(count)
        ]
        for part in parts:
            if state is not None:
                part.set_state(state)
        for _ in range(3):
            read = [next(part) for part in parts]
            same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *read), expected[position])
            position += 1
        (state,) = {json.dumps(part.get_state()) for part in parts}
        state = json.loads(state)
    with pytest.raises(InputError, match="a batch of 4 rows cannot be shared evenly by 3 processes"):
        make(lazy, batch_size=4, seed=2, share=Share(process_count=3))


def test_orbax_saves_and_restores_the_position(lazy, tmp_path):
    iterator = PIPELINES["buckets"](lazy, batch_size=4, seed=2)
    for _ in range(7):
        next(iterator)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, {"x": np.zeros(1)}, iterator, {})
    ahead = [next(iterator) for _ in range(3)]
    resumed = PIPELINES["buckets"](lazy, batch_size=4, seed=2)
    assert checkpoints.restore_newest({"x": np.zeros(1)}, resumed)[0] == 7
    checkpoints.close()
    for expected in ahead:
        same(next(resumed), expected)


@pytest.mark.parametrize("before, after", [(1, 2), (4, 2), (2, 1)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(lazy, tmp_path, before, after):
    """Every process of the new number reads its part of the batches that would have come."""

    def parts(count):
        shares = [Share(process_index=i, process_count=count) for i in range(count)]
        return [PIPELINES["packed"](lazy, batch_size=4, seed=2, share=share) for share in shares]

    whole = PIPELINES["packed"](lazy, batch_size=4, seed=2)
    expected = [next(whole) for _ in range(8)]
    checkpoints = Checkpoints(tmp_path)
    first, *others = parts(before)
    for _ in range(5):
        for part in (first, *others):
            next(part)
    assert {json.dumps(part.get_state()) for part in others} <= {json.dumps(first.get_state())}
    checkpoints.save(5, {"x": np.zeros(1)}, first, {})
    resumed = parts(after)
    for part in resumed:
        assert checkpoints.restore_newest({"x": np.zeros(1)}, part)[0] == 5
    for batch in expected[5:]:
        same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(next, resumed)), batch)
    stranger = PIPELINES["packed"](lazy, batch_size=4, seed=3)
    with pytest.raises(InputError, match="is of another order of batches .*: go on with the data, seed and"):
        checkpoints.restore_newest({"x": np.zeros(1)}, stranger)
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "5").exists()


def test_a_position_in_rows_of_other_lengths_is_refused(lazy):
    encoded = lazy["demonstrations"]
    state = b.demonstration_batches(encoded, batch_size=4, seed=2).get_state()
    for other in (encoded.rows[::-1], [*encoded.rows[:-1], encoded.rows[0]]):
        assert len(other) == len(encoded)
        iterator = b.demonstration_batches(dataclasses.replace(encoded, rows=other), batch_size=4, seed=2)
        with pytest.raises(InputError, match="is of another order of batches"):
            iterator.set_state(state)


def test_a_position_in_rows_of_equal_lengths_that_say_something_else_is_refused(tokenizer, tmp_path):
    """Labels swapped, in memory and in a set that is prepared again; the very same set prepared again goes on."""
    lines = [{"prompt": f"{i % 7}", "chosen": "warm", "rejected": "dull"} for i in range(12)]
    swapped = [line | {"chosen": "dull", "rejected": "warm"} for line in lines]
    states = {}
    for name, said in (("first", lines), ("again", lines), ("swapped", swapped)):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, said)))
        directory = tmp_path / name
        prepared.prepare(path, "preferences", directory)
        for where, rows in (
            ("memory", readers.read_preferences(path)[0]),
            ("disk", prepared.open_prepared(directory).rows),
        ):
            encoded, _ = b.encode_preferences(rows, tokenizer, prompt_length=P, response_length=P)
            mixed = Mixture(parts=(encoded.rows, encoded.rows), weights=(1.0, 1.0))
            for kind, those in (("plain", encoded), ("mixed", dataclasses.replace(encoded, rows=mixed))):
                iterator = b.preference_batches(those, batch_size=4, seed=2)
                key = (where, kind)
                states.setdefault(key, iterator.get_state())
                if name == "swapped":
                    with pytest.raises(InputError, match="is of another order of batches"):
                        iterator.set_state(states[key])
                else:
                    iterator.set_state(states[key])


def test_a_position_of_another_order_is_refused(lazy):
    state = PIPELINES["demonstrations"](lazy, batch_size=4, seed=2).get_state()
    others = [
        PIPELINES["demonstrations"](lazy, batch_size=4, seed=3),
        PIPELINES["demonstrations"](lazy, batch_size=8, seed=2),
        PIPELINES["packed"](lazy, batch_size=4, seed=2),
        PIPELINES["buckets"](lazy, batch_size=4, seed=2),
        PIPELINES["mixture"](lazy, batch_size=4, seed=2),
        PIPELINES["preferences"](lazy, batch_size=4, seed=2),
    ]
    for other in others:
        with pytest.raises(
            InputError, match="is of another order of batches .*: go on with the data, seed and"
        ):
            other.set_state(state)


@pytest.mark.parametrize("kind", ["demonstrations", "preferences", "prompts"])
def test_rows_on_disk_make_the_batches_of_rows_in_memory(sets, lazy, tokenizer, kind):
    from rlhf_jax.data import builders, readers

    rows, _ = readers.read_all(sets[kind][1], builders.KINDS[kind].to_rows)
    encode = {
        "demonstrations": lambda rows: b.encode_demonstrations(rows, tokenizer, **WIDTHS),
        "preferences": lambda rows: b.encode_preferences(rows, tokenizer, **WIDTHS),
        "prompts": lambda rows: b.encode_prompts(rows, tokenizer, prompt_length=P),
    }[kind]
    eager, report = encode(rows)
    assert encode(sets[kind][0].rows)[1] == report
    assert list(lazy[kind].rows) == list(eager.rows)
    assert list(lazy[kind].rows[3:7]) == list(eager.rows[3:7])
    np.testing.assert_array_equal(b.lengths_of(lazy[kind]), b.lengths_of(eager))
    how = {"batch_size": 6, "seed": 11}
    for one, other in zip(
        range(15),
        zip(PIPELINES[kind](lazy, **how), PIPELINES[kind]({kind: eager}, **how), strict=False),
        strict=False,
    ):
        same(*other)
        assert one < 15
    for (left, mask), (right, other_mask) in zip(
        b.eval_batches(lazy[kind], 7), b.eval_batches(eager, 7), strict=True
    ):
        same(left, right)
        np.testing.assert_array_equal(mask, other_mask)


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_what_does_not_fit_is_reported_alike_and_remembered(sets, tokenizer, truncation, monkeypatch):
    from rlhf_jax.data import builders, readers, scans

    opened, path = sets["demonstrations"]
    rows, _ = readers.read_all(path, builders.KINDS["demonstrations"].to_rows)
    narrow = {"prompt_length": 14, "response_length": 14, "truncation": truncation}
    eager, report = b.encode_demonstrations(rows, tokenizer, **narrow)
    assert report.dropped or report.truncated
    monkeypatch.setattr(scans, "_CHUNK", 20)
    seen = []
    first, first_report = b.encode_demonstrations(
        opened.rows, tokenizer, progress=lambda *counts: seen.append(counts), **narrow
    )
    assert seen == [(0, 53), (20, 53), (40, 53), (53, 53)]

    def never(*_):
        raise AssertionError("the set was scanned a second time")

    monkeypatch.setattr(scans, "_scan", never)
    again, again_report = b.encode_demonstrations(opened.rows, tokenizer, **narrow)
    assert first_report == again_report == report
    assert list(first.rows) == list(again.rows) == list(eager.rows)
    # Of a part of the set, the report speaks of that part alone.
    half = opened.rows.select(np.arange(0, len(rows), 2))
    part, part_report = b.encode_demonstrations(half, tokenizer, **narrow)
    expected, expected_report = b.encode_demonstrations(rows[::2], tokenizer, **narrow)
    assert (list(part.rows), part_report) == (list(expected.rows), expected_report)


def test_a_scan_that_is_damaged_is_made_again(sets, tokenizer):
    opened, _ = sets["prompts"]
    directory = opened.rows.directory
    b.encode_prompts(opened.rows, tokenizer, prompt_length=15)
    for path in directory.glob("scan-*.npz"):
        path.write_bytes(path.read_bytes()[:20])
    encoded, report = b.encode_prompts(opened.rows, tokenizer, prompt_length=15)
    assert (len(encoded), report.kept) == (len(opened.rows), len(opened.rows))


def test_too_long_a_row_on_disk_is_an_error_that_names_it(sets, tokenizer):
    with pytest.raises(
        InputError, match=r"demonstrations.jsonl:\d+ has a prompt of \d+ tokens where prompt_length is 4"
    ):
        b.encode_demonstrations(sets["demonstrations"][0].rows, tokenizer, prompt_length=4, response_length=R)
    with pytest.raises(
        InputError, match="all 53 rows were dropped, the first .demonstrations.jsonl:1. because it has"
    ):
        b.encode_demonstrations(
            sets["demonstrations"][0].rows, tokenizer, prompt_length=2, response_length=2, truncation="drop"
        )


def rows_of(batch):
    return [tuple(leaf[i].tobytes() for leaf in jax.tree.leaves(batch)) for i in range(len(batch.tokens))]


def test_sources_are_mixed_by_weight_and_each_is_seen_whole_every_epoch_of_its_own(lazy):
    encoded = mixed(lazy["demonstrations"])  # 20 rows at weight 3, 33 rows at weight 1
    index_of = {}
    for batch, _ in b.eval_batches(encoded, 1):
        index_of.setdefault(rows_of(batch)[0], len(index_of))
    assert len(index_of) == 53
    iterator = b.demonstration_batches(encoded, batch_size=4, seed=0)
    seen = [index_of[key] for _ in range(99) for key in rows_of(next(iterator))]
    for end in range(40, 397, 40):  # never far from three to one
        assert abs(sum(index < 20 for index in seen[:end]) - 0.75 * end) <= 2
    first = [index for index in seen if index < 20]
    second = [index for index in seen if index >= 20]
    for source, size in ((first, 20), (second, 33)):
        epochs = [source[start : start + size] for start in range(0, len(source) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_bad_mixtures(lazy):
    rows = lazy["demonstrations"].rows
    with pytest.raises(InputError, match="2 sources have 1 weights: give one weight for each"):
        Mixture(parts=(rows, rows), weights=(1.0,))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="a source has the weight .*: give a positive number"):
            Mixture(parts=(rows,), weights=(weight,))
    mixture = Mixture(parts=(rows[:3], rows[5:9]), weights=(1.0, 2.0))
    assert list(mixture) == [*rows[:3], *rows[5:9]] == mixture.fetch(np.arange(7)) == mixture[:]
    assert mixture[-1] == rows[8]


def test_buckets_are_narrow_and_hold_every_row(lazy):
    encoded = lazy["demonstrations"]
    buckets = b.bucketed(encoded, 3)
    lengths = b.lengths_of(encoded)
    assert len(buckets.widths) == 3
    sizes = {}
    for rows, width in zip(buckets.rows(), buckets.widths, strict=True):
        assert tuple(lengths[rows].max(axis=0)) == width
        assert len(rows) >= 10
        sizes[sum(width)] = len(rows)
    order = np.argsort(buckets.of_row, kind="stable")
    assert (np.diff(lengths.sum(axis=1)[order].astype(int))[np.diff(buckets.of_row[order]) > 0] != 0).all()
    assert sum(sizes.values()) == len(encoded) and len(sizes) == 3
    iterator = b.demonstration_batches(encoded, batch_size=4, seed=1, num_buckets=3)
    found = [next(iterator) for _ in range(120)]
    widths = [batch.tokens.shape[1] for batch in found]
    for width, size in sizes.items():  # as often as its rows are many
        assert widths.count(width) == pytest.approx(120 * size / len(encoded), abs=2)
    said = {
        tuple(tokens[mask].tolist())
        for batch in found
        for tokens, mask in zip(batch.tokens, batch.token_mask, strict=True)
    }
    assert said == {(*row.prompt_ids, *row.response_ids) for row in encoded.rows}
    with pytest.raises(InputError, match="the number of buckets is 0"):
        b.demonstration_batches(encoded, batch_size=4, seed=1, num_buckets=0)


def test_an_iterator_that_is_closed_says_so(lazy):
    iterator = PIPELINES["prompts"](lazy, batch_size=4, seed=1)
    assert isinstance(iterator, BatchIterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_a_batch_says_where_its_rows_came_from(lazy):
    encoded = lazy["prompts"]
    iterator = b.prompt_batches(encoded, batch_size=6, seed=1, share=Share(process_index=1, process_count=2))
    for number in range(9):  # beyond the first epoch of 23 rows
        own = [encoded.rows[int(i)].row.source for i in next(iterator)["index"]]
        assert iterator.sources_of(number)[3:] == own
    packed = b.packed_batches(lazy["demonstrations"], batch_size=2, seed=1)
    found = packed.sources_of(0)
    assert len(found) == next(packed).segment_ids.max(axis=1).sum() > 2
