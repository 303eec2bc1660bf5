"""What the data costs: memory and time to prepare, scan and read many rows, and tokens a second; one JSON line.

    python -m benchmarks.data --rows=1000000 --workdir=/tmp/data_bench
    python -m benchmarks.data --rows=1000000 --workdir=/tmp/data_bench --num_workers=1

Rows are synthetic demonstrations of about ``--seq`` tokens for ``--tokenizer`` (a Hugging Face directory; without one,
the embedded world's). Prepared and scanned sets in ``--workdir`` are used again, so that a second call measures what a
second run costs: open, first batch, batches. peak_rss_mib is of this process (resource.getrusage), worker_rss_mib of
its largest child. tokens_per_s counts every token of a batch that is not padding.
"""

from __future__ import annotations

import json
import pathlib
import random
import resource
import time

from absl import app, flags

from rlhf_jax.data import batches, pipeline, prepared, world
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.stages import inputs

ROWS = flags.DEFINE_integer("rows", 1_000_000, "How many demonstrations.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the source and the prepared set lie.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", "", "A Hugging Face directory; empty: the embedded world's.")
SEQ = flags.DEFINE_integer("seq", 256, "Columns of a batch: a quarter for the prompt.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows a batch.")
STEPS = flags.DEFINE_integer("steps", 200, "Batches that are timed, after the first.")
WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes that make batches ahead of time.")
PACK = flags.DEFINE_bool("pack", False, "Whether rows are packed.")


def write_source(path: pathlib.Path, words: list[str], count: int, prompt: int, response: int) -> None:
    """``count`` rows of up to so many words each; the generator's seed is 0."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            texts = (
                " ".join(generator.choices(words, k=generator.randint(limit // 2, limit)))
                for limit in (prompt, response)
            )
            said = dict(zip(("prompt", "response"), texts, strict=True))
            stream.write(json.dumps({"id": number, **said}) + "\n")


def main(argv):
    del argv
    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.load_tokenizer(TOKENIZER.value) if TOKENIZER.value else world.world_tokenizer()
    prompt, response = SEQ.value // 4, SEQ.value - SEQ.value // 4
    source, place = workdir / f"{ROWS.value}.jsonl", workdir / f"{ROWS.value}"
    found = {"rows": ROWS.value}
    if not prepared.is_prepared(place):
        words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
        per_word = 1 if not TOKENIZER.value else 3
        write_source(source, words, ROWS.value, (prompt - 2) // per_word, (response - 2) // per_word)
        with _timed(found, "prepare_s"):
            prepared.prepare(source, "demonstrations", place)
        found["rss_after_prepare_mib"] = _peak(resource.RUSAGE_SELF)
    with _timed(found, "first_batch_s"):
        rows = inputs.load_demonstrations(inputs.DataConfig(path=str(place), held_out_fraction=0.01)).train
        encoded, report = batches.encode_demonstrations(
            rows, tokenizer, prompt_length=prompt, response_length=response, truncation="keep_start"
        )
        make = batches.packed_batches if PACK.value else batches.demonstration_batches
        share = pipeline.Share(num_workers=WORKERS.value)
        iterator = make(encoded, batch_size=BATCH.value, seed=0, share=share)
        next(iterator)
    tokens = 0
    with _timed(found, "batches_s"):
        for _ in range(STEPS.value):
            tokens += int(next(iterator).token_mask.sum())
    iterator.close()
    found |= {
        "kept": report.kept,
        "truncated": len(report.truncated),
        "tokens_per_s": round(tokens / found["batches_s"]),
        "peak_rss_mib": _peak(resource.RUSAGE_SELF),
        "worker_rss_mib": _peak(resource.RUSAGE_CHILDREN),
    }
    print(json.dumps(found))


class _timed:
    """Adds the seconds that a block takes to a mapping."""

    def __init__(self, found: dict, name: str):
        self._found, self._name = found, name

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *_):
        self._found[self._name] = round(time.monotonic() - self._start, 3)


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


if __name__ == "__main__":
    app.run(main)
