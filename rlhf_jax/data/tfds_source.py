"""Streams the records of any TFDS data set, as JSON values; imports files, fields, errors and TFDS.

A name is "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:NAME:SPLIT". NAME may be "huggingface:OWNER/NAME", of the Hugging
Face Hub, which the package datasets reads. What is not there yet is downloaded and prepared as array records.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builders import huggingface_dataset_builder

from rlhf_jax.data.files import Record
from rlhf_jax.errors import InputError

PREFIX = "tfds:"
_HUB = "huggingface:"


def open_tfds(name: str, *, data_dir: str | None) -> tuple[tfds.core.DatasetBuilder, str]:
    """(the prepared builder, the split) that a name stands for.

    Args:
      name: begins with "tfds:"; the split is "train" where it names none.
      data_dir: where TFDS keeps data sets; None: its own default.

    Raises:
      InputError: TFDS does not know it, cannot prepare it, or it has no such split.
    """
    dataset, colon, split = name.removeprefix(PREFIX).rpartition(":")
    if not colon or dataset == "huggingface":
        dataset, split = name.removeprefix(PREFIX), "train"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = _builder(dataset, data_dir)
            if not builder.info.splits:
                builder.download_and_prepare(file_format="array_record")
    except InputError:
        raise
    except Exception as error:  # TFDS and what it calls raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"TFDS cannot give {dataset!r} ({reason}): check the name and --tfds_dir, or prepare it with TFDS as "
            "file_format='array_record' first."
        ) from error
    if split not in builder.info.splits:
        raise InputError(
            f"{dataset!r} has no split {split!r}: use one of {', '.join(sorted(builder.info.splits))}."
        )
    return builder, split


def _builder(dataset: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    if not dataset.startswith(_HUB):
        return tfds.builder(dataset, data_dir=data_dir)
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise InputError(
            f"{dataset!r} is of the Hugging Face Hub, which the package datasets reads: pip install datasets."
        ) from None
    # TFDS's own names, "OWNER__NAME", are small letters, for which it would list every data set of the Hub.
    owner, slash, rest = dataset.removeprefix(_HUB).replace("__", "/", 1).partition("/")
    name, _, config = rest.partition("/")
    return huggingface_dataset_builder.HuggingfaceDatasetBuilder(
        hf_repo_id=owner + slash + name,
        hf_config=config or None,
        data_dir=data_dir,
        file_format="array_record",
    )


def tfds_records(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[Record]:
    """Every record of a split, its values as they are in JSON."""
    try:
        source = builder.as_data_source(split)
    except NotImplementedError:
        raise InputError(
            f"{builder.name} is prepared in {builder.data_dir} without random access: prepare it again with "
            "file_format='array_record'."
        ) from None
    for number in range(len(source)):
        yield Record(
            source=f"{builder.name}/{split}:{number + 1}",
            where=f"row {number + 1} of {builder.name}/{split}",
            parse=lambda number=number: as_json(source[number], builder.info.features),
            progress=(number + 1) / len(source),
        )


def tfds_files(builder: tfds.core.DatasetBuilder) -> list[pathlib.Path]:
    """The files that the data set is made of."""
    return sorted(file for file in pathlib.Path(str(builder.data_dir)).iterdir() if file.is_file())


def as_json(value: Any, feature: Any) -> Any:
    """A value of a data source as JSON has it: texts for bytes, numbers, lists; a sequence of objects is a list."""
    if isinstance(feature, tfds.features.Sequence) and isinstance(value, dict):
        columns = {name: as_json(value[name], None) for name in value}
        return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]
    if isinstance(value, dict):
        return {name: as_json(inner, feature[name] if feature else None) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist(), None)
    if isinstance(value, list | tuple):
        return [as_json(inner, None) for inner in value]
    return value
