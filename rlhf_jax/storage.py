"""Where runs live: directories of this machine, and folders of Cloud Storage buckets by their URL. Imports errors.

Both are used through what ``pathlib.Path`` and ``etils.epath.Path`` have in common, so that a stage does not ask which
it has. What differs, and is met here or in ``checkpoints``:

- An object of a bucket appears whole, once what writes it is closed, and nothing can be appended to it.
- A bucket has no folders to make, and no rename of many objects at once: what consists of several objects is whole once
  the one that is written last is there.
- Libraries that take a directory's name (tokenizers, TensorBoard) work in a local one, whose files are then uploaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import TypeAlias

from etils import epath

from rlhf_jax.errors import InputError

Path: TypeAlias = pathlib.Path | epath.Path

_BUCKET = "gs://"


def at(path: str | os.PathLike) -> Path:
    """``path`` as a path of this machine's file system, or of a bucket where it is a gs:// URL.

    Raises:
      InputError: a URL of another kind; one that went through ``pathlib``, which takes a slash away; or a bucket's, and
        what reads buckets is not installed.
    """
    name = os.fspath(path)
    if not name.startswith(_BUCKET):
        return local_path(path)
    if not re.match(r"gs://[a-z0-9][a-z0-9._-]+/[^/]", name):
        raise InputError(f"{name} names no folder of a bucket; give one, as gs://bucket/run")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{name} lies in a bucket, and gcsfs is not installed: pip install 'rlhf_jax[gcs]', or mount the bucket "
            "on every host with gcsfuse and give the path there"
        )
    import fsspec

    # TensorStore writes beside fsspec and past its lists of what is there, which would go stale.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(name.rstrip("/"))


def local_path(path: str | os.PathLike) -> pathlib.Path:
    """``path`` as a path of this machine's file system, a mounted bucket or network directory among them.

    Raises:
      InputError: it is a URL, which pathlib would take for a directory named "gs:".
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise InputError(
            f"{path} is a URL, and here a directory is needed (a stage's --workdir and runs to start from may be "
            "gs://bucket/folder, as text); mount what it names on every host (a Cloud Storage bucket with gcsfuse), "
            "and give the path there"
        )
    return pathlib.Path(path)


def in_bucket(path: Path) -> bool:
    """Whether a path that ``at`` made is one of a bucket."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """``path`` from the root on, which a bucket's is anyway."""
    return path if in_bucket(path) else path.absolute()


def make_directory(path: Path) -> None:
    """Makes a directory and those above it; a bucket needs none."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole whenever somebody reads it: the former content, or ``content`` (text as UTF-8)."""
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def remove(path: Path) -> None:
    """Removes a directory with all that is in it, or nothing where there is none."""
    if not in_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


def files(directory: Path) -> dict[str, str | None]:
    """Names of all files below ``directory`` -> the CRC-32C that a bucket keeps (base 64); None of a local file.

    gcsfuse and the console leave an empty object ``folder/`` for a folder of a flat bucket; those are no files.
    """
    if not in_bucket(directory):
        return {str(file.relative_to(directory)): None for file in directory.rglob("*") if file.is_file()}
    import fsspec

    above = os.fspath(directory).removeprefix(_BUCKET) + "/"
    listed = fsspec.filesystem("gs").find(above, detail=True)
    return {name.removeprefix(above): entry["crc32c"] for name, entry in listed.items() if name[-1] != "/"}


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[pathlib.Path]:
    """``directory`` as a local one for libraries that take a name: itself, or a copy for as long as the block lasts."""
    if not in_bucket(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in files(directory):
            (pathlib.Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            (pathlib.Path(copy) / name).write_bytes((directory / name).read_bytes())
        yield pathlib.Path(copy)


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[pathlib.Path]:
    """A local directory, for the block to make, whose files end up in ``directory``: that one, or one to upload."""
    if not in_bucket(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as above:
        copy = pathlib.Path(above) / directory.name
        yield copy
        upload(copy, directory)


def upload(source: pathlib.Path, target: Path) -> None:
    """Writes every file below ``source`` into a bucket, over what is there under its name."""
    for name in files(source):
        replace(target / name, (source / name).read_bytes())


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """Within the block ``path`` is looked at and read; what its disk or bucket says to that is said in a sentence.

    Raises:
      InputError: it may not be read, or cannot be.
    """
    try:
        yield
    except Exception as error:
        said = problem(error)
        if said is None:
            raise
        raise InputError(
            f"cannot read {path}: {said}; give this account access to it, or mend the disk, then run the same command "
            "again"
        ) from error


def problem(error: Exception) -> str | None:
    """What a disk or a bucket said, or None where an error is not their doing.

    TensorStore's ValueError has it in its text; the clients of Cloud Storage raise errors of packages of their own.
    """
    if isinstance(error, InputError):
        return None
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split()) or type(error).__name__
    if type(error).__module__.split(".")[0] in _CLIENTS:
        return " ".join(str(error).split())[:200] or type(error).__name__
    text = str(error) if isinstance(error, ValueError) else ""
    found = re.search(r"([^:]+) \[os_error_code='\d+'", text)
    if found:
        return found.group(1).strip()
    return " ".join(text.split())[:200] if _BUCKET in text else None


_CLIENTS = {"gcsfs", "google", "aiohttp", "requests"}
