"""Prepares a data set: reads files once, checks every row, and writes array records that open at once.

    python -m experiments.prepare_data --source=pairs.jsonl.gz --kind=preferences --output=data/pairs
    python -m experiments.prepare_data --source=shards/ --kind=demonstrations --output=data/sft --on_bad_row=skip
    python -m experiments.prepare_data --source=tfds:imdb_reviews --kind=unpaired --output=data/imdb

A stage then reads it with --config.data.path=data/pairs, and python -m experiments.inspect_data shows what is in it.
"""

import collections
import sys

import tqdm
from absl import flags

from experiments import launch
from rlhf_jax.data import builders, prepared
from rlhf_jax.training.interrupt import Interrupted

SOURCE = flags.DEFINE_string(
    "source",
    None,
    "What to read: a file (.jsonl, .json, .parquet, .txt, .pos, .neg; the first, second and fourth also as .gz), a "
    "directory of such files, or tfds:NAME of a TensorFlow data set (tfds:NAME:SPLIT for a split other than train).",
    required=True,
)
KIND = flags.DEFINE_enum("kind", None, list(builders.KINDS), "What the rows are.", required=True)
OUTPUT = flags.DEFINE_string(
    "output", None, "The directory to make; it appears whole or not at all.", required=True
)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row",
    "error",
    ["error", "skip"],
    "What a row that cannot be used does: stop with a sentence that names it, or be left out, counted and listed.",
)
TFDS_DIR = flags.DEFINE_string(
    "tfds_dir", None, "Where TensorFlow Datasets keeps its data sets; its own default unless given."
)
# How many of the rows left out are shown; all are listed in prepared.json.
SHOWN = 10


def main(stop):
    with tqdm.tqdm(total=100, unit="%", desc="prepare", disable=not sys.stderr.isatty()) as bar:

        def progress(rows: int, share: float) -> None:
            if stop.requested:
                raise Interrupted(
                    f"stopped by {stop.requested}: nothing was kept; run the same command again"
                )
            bar.set_postfix_str(f"{rows:,} rows", refresh=False)
            bar.update(100 * share - bar.n)

        manifest = prepared.prepare(
            SOURCE.value,
            KIND.value,
            OUTPUT.value,
            on_bad_row=ON_BAD_ROW.value,
            tfds_dir=TFDS_DIR.value,
            progress=progress,
        )
    print(summary(manifest))


def summary(manifest: prepared.Manifest) -> str:
    """What was kept, what was left out, and why."""
    used = manifest.records - len(manifest.skipped)
    lines = [
        f"kept {manifest.rows:,} rows ({manifest.kind}) of {used:,} records; left out {len(manifest.skipped):,} of "
        f"{manifest.records:,} records"
    ]
    reasons = collections.Counter(reason for _, reason in manifest.skipped)
    lines += [f"{count:>8,}  {reason}" for reason, count in reasons.most_common(SHOWN)]
    if len(reasons) > SHOWN:
        lines.append(f"{'':8}  and {len(reasons) - SHOWN:,} other reasons")
    lines += [f"          {source} {reason}" for source, reason in manifest.skipped[:SHOWN]]
    if len(manifest.skipped) > SHOWN:
        lines.append(f"          the rest is listed in {OUTPUT.value}/{prepared.MANIFEST}")
    return "\n".join([*lines, OUTPUT.value])


if __name__ == "__main__":
    launch.launch(main)
