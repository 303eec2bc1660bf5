"""Prepares a data set: reads files once, checks every row, and writes array records that open at once.

    python -m experiments.prepare_data --source=pairs.jsonl.gz --kind=preferences --output=data/pairs
    python -m experiments.prepare_data --source=shards/ --kind=demonstrations --output=data/sft --on_bad_row=skip
    python -m experiments.prepare_data --source=tfds:imdb_reviews --kind=unpaired --output=data/imdb
    python -m experiments.prepare_data --source=big/ --kind=demonstrations --output=data/big \\
        --tokenizer=<Hugging Face directory> --prompt_length=256 --response_length=768 --truncation=drop

With --tokenizer it also finds out which rows fit, which a stage with the same tokenizer, lengths and truncation would
otherwise do when it starts; only large sets need that. A stage reads the set with --config.data.path=data/pairs, and
python -m experiments.inspect_data shows what is in it.
"""

import collections
import sys

import tqdm
from absl import flags

from experiments import launch
from rlhf_jax.data import batches, builders, prepared
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
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
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "",
    "A Hugging Face directory (or the tokenizer/ of a hand-off): demonstrations, preferences, prompts or steps are "
    "tokenised once with it, and what fits is remembered.",
)
PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 16, "As --config.data.prompt_length, with --tokenizer.")
RESPONSE_LENGTH = flags.DEFINE_integer(
    "response_length", 48, "As --config.data.response_length, with --tokenizer."
)
TRUNCATION = flags.DEFINE_enum(
    "truncation", "error", batches.TRUNCATIONS, "As --config.data.truncation, with --tokenizer."
)
STEP_MARK = flags.DEFINE_string(
    "step_mark", "\n", "As --config.step_mark, with --tokenizer and --kind=steps."
)
# How many of the rows left out are shown; all are listed in prepared.json.
SHOWN = 10
ENCODERS = {
    "demonstrations": batches.encode_demonstrations,
    "preferences": batches.encode_preferences,
    "prompts": batches.encode_prompts,
    "steps": batches.encode_process_steps,
}


def main(stop):
    if TOKENIZER.value and KIND.value not in ENCODERS:
        raise InputError(
            f"--tokenizer is of no use for --kind={KIND.value}: give one of {', '.join(ENCODERS)}."
        )
    tokenizer = tokenizers.load_tokenizer(TOKENIZER.value) if TOKENIZER.value else None
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
    if tokenizer is not None:
        print(scan(tokenizer, stop))
    print(OUTPUT.value)


def scan(tokenizer, stop) -> str:
    """Which rows fit, remembered in the set and said in a line."""
    how = {"prompt_length": PROMPT_LENGTH.value, "truncation": TRUNCATION.value}
    if KIND.value != "prompts":
        how["response_length"] = RESPONSE_LENGTH.value
    if KIND.value == "steps":
        how["step_mark"] = STEP_MARK.value
    rows = prepared.open_prepared(OUTPUT.value).rows
    with tqdm.tqdm(total=len(rows), unit=" rows", desc="scan", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            if stop.requested:
                raise Interrupted(
                    f"stopped by {stop.requested}: {OUTPUT.value} is whole; the stage that reads it will scan it"
                )
            bar.update(done - bar.n)

        _, report = ENCODERS[KIND.value](rows, tokenizer, progress=progress, **how)
    cut, left_out = len(report.truncated), len(report.dropped)
    return f"{report.kept:,} rows fit or were cut to fit ({cut:,} were cut); {left_out:,} do not"


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
    return "\n".join(lines)


if __name__ == "__main__":
    launch.launch(main)
