"""Looks at preference data before anything is trained on it: prints what it finds and writes report.html.

    python -m experiments.inspect_data --workdir=runs/data --data=pairs.jsonl.gz
    python -m experiments.inspect_data --workdir=runs/data --data=train=train.jsonl,test=test.jsonl

Lengths and length bias; pairs labelled both ways, and cycles, which no scalar reward can fit; how far annotators agree,
and so what accuracy a reward model can reach; prompts and responses that splits share. --data takes files, directories
of shards and prepared sets, of preferences or of rankings; with names before "=", the first is what is trained on.
"""

import pathlib

from absl import flags

from experiments import launch
from rlhf_jax import storage
from rlhf_jax.data import prepared, readers
from rlhf_jax.data.rows import pairs
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report_data

WORKDIR = flags.DEFINE_string("workdir", None, "Directory that report.html is written to.", required=True)
DATA = flags.DEFINE_list("data", None, "Comma-separated path, or name=path, one a split.", required=True)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "error", list(readers.ON_BAD_ROW), "Whether a bad row stops, or is left out and listed."
)
HELD_OUT_FRACTION = flags.DEFINE_float(
    "held_out_fraction", 0.1, "Of one split: how many rows a division would hold out.", lower_bound=0.0
)
SPLIT_SEED = flags.DEFINE_integer("split_seed", 0, "Of that division.", lower_bound=0)


def main(stop):
    del stop
    workdir = storage.local_path(WORKDIR.value)
    splits, left_out = {}, []
    for item in DATA.value:
        name, equals, path = item.partition("=")
        path = path if equals else item
        name = name if equals else "all"
        if name in splits:
            raise InputError(f"--data names {name!r} twice: write name=path, each name once.")
        splits[name], skipped = read(path)
        left_out += skipped
    found = report_data.examine(
        splits, left_out=left_out, held_out_fraction=HELD_OUT_FRACTION.value, seed=SPLIT_SEED.value
    )
    print("\n".join(report_data.summary(found)))
    title = ", ".join(pathlib.Path(item.partition("=")[2] or item).name for item in DATA.value)
    print(report_data.write_data_report(workdir, title, found))


def read(path):
    """(preferences, what was left out of them) of a file, a directory of shards or a prepared set."""
    if not prepared.is_prepared(path):
        rows, report = readers.read_preferences(path, on_bad_row=ON_BAD_ROW.value, flag="--on_bad_row")
        return rows, report.skipped
    opened = prepared.open_prepared(path)
    kind = opened.manifest.kind
    if kind not in ("preferences", "rankings"):
        raise InputError(f"{path} was prepared as {kind}: give a set of preferences or of rankings.")
    rows = list(opened.rows)
    if kind == "rankings":
        rows = [pair for row in rows for pair in pairs(row)]
    return rows, opened.manifest.skipped


if __name__ == "__main__":
    launch.launch(main)
