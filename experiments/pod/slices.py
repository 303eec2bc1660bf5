"""What Google Cloud calls a TPU slice, and how many machines it has. Imports rlhf_jax.errors only."""

from __future__ import annotations

import dataclasses
import math
import re

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """Names of a TPU version.

    accelerator: GKE's node label. kind: what Compute Engine puts before the size. cores: by how many that size counts a
    chip. runtime: the image of a TPU VM. axes: of a topology. largest_host: most chips of a slice that is one machine.
    """

    accelerator: str
    kind: str
    cores: int
    runtime: str
    axes: int
    largest_host: int


# Google Cloud: "Plan TPUs in GKE" (labels, chips of a machine) and "TPU software versions" (runtimes).
VERSIONS = {
    "v4": Version(
        accelerator="tpu-v4-podslice",
        kind="v4",
        cores=2,
        runtime="tpu-ubuntu2204-base",
        axes=3,
        largest_host=4,
    ),
    "v5e": Version(
        accelerator="tpu-v5-lite-podslice",
        kind="v5litepod",
        cores=1,
        runtime="v2-alpha-tpuv5-lite",
        axes=2,
        largest_host=8,
    ),
    "v5p": Version(
        accelerator="tpu-v5p-slice",
        kind="v5p",
        cores=2,
        runtime="v2-alpha-tpuv5",
        axes=3,
        largest_host=4,
    ),
    "v6e": Version(
        accelerator="tpu-v6e-slice",
        kind="v6e",
        cores=1,
        runtime="v2-alpha-tpuv6e",
        axes=2,
        largest_host=8,
    ),
}

# Chips of each machine of a slice of several, whatever the version.
_CHIPS_OF_A_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice. shape: chips along each axis."""

    version: Version
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.version.largest_host else self.chips // _CHIPS_OF_A_HOST

    @property
    def chips_of_a_host(self) -> int:
        return self.chips // self.hosts

    @property
    def topology(self) -> str:
        """As GKE's label has it: 4x8."""
        return "x".join(str(size) for size in self.shape)

    @property
    def accelerator_type(self) -> str:
        """As Compute Engine has it: v5litepod-32, v5p-256."""
        return f"{self.version.kind}-{self.chips * self.version.cores}"


def parse(topology: str) -> Slice:
    """The slice of ``--topology``, as the planner takes it: v5e:4x8, v5p:4x4x8.

    Raises:
      InputError: an unknown version, or a shape that no slice of it has.
    """
    name, _, shape = topology.partition(":")
    version = VERSIONS.get(name)
    if version is None:
        raise InputError(
            f"--topology={topology}: there is no version {name!r} here; start with {', '.join(VERSIONS)}, as v5e:4x8"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != version.axes:
        example = "x".join(["4"] * version.axes)
        raise InputError(
            f"--topology={topology}: {name} slices have {version.axes} axes; give it as {name}:{example}"
        )
    found = Slice(version=version, shape=tuple(int(size) for size in shape.split("x")))
    if found.chips > version.largest_host and found.chips % _CHIPS_OF_A_HOST:
        raise InputError(
            f"--topology={topology} has {found.chips} chips, which are no whole machines of {_CHIPS_OF_A_HOST}; "
            "give a multiple"
        )
    return found
