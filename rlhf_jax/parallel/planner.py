"""What a compiled program needs of a chip, and how fast it could be: memory, roofline, ranking. Imports hlo and errors.

Nothing here runs a program. Memory is the compiler's own answer; time is a bound from what the program says it does and
what the chip's maker says it can do.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hlo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them. memory: bytes. flops: bfloat16, a second. bandwidth: to memory, bytes a second.
    links: bytes a second that it can send to others, all links together."""

    memory: float
    flops: float
    bandwidth: float
    links: float


# By JAX's device_kind. TPUs: Google Cloud's "System architecture" page of each version; of memory, what the compiler
# says that it may use; links are half of what the page gives for both directions together. GPUs: NVIDIA's data sheets,
# dense. A v2 or v3 chip is two devices and is not here.
CHIPS = {
    "TPU v4": Chip(memory=30.75 * 2**30, flops=275e12, bandwidth=1228e9, links=300e9),
    "TPU v5 lite": Chip(memory=15.75 * 2**30, flops=197e12, bandwidth=819e9, links=200e9),
    "TPU v5": Chip(memory=95.73 * 2**30, flops=459e12, bandwidth=2765e9, links=600e9),
    "TPU v6 lite": Chip(memory=31.24 * 2**30, flops=918e12, bandwidth=1640e9, links=448e9),
    "NVIDIA A100-SXM4-40GB": Chip(memory=40e9, flops=312e12, bandwidth=1555e9, links=300e9),
    "NVIDIA A100-SXM4-80GB": Chip(memory=80e9, flops=312e12, bandwidth=2039e9, links=300e9),
    "NVIDIA H100 80GB HBM3": Chip(memory=80e9, flops=989e12, bandwidth=3350e9, links=450e9),
    "NVIDIA H200": Chip(memory=141e9, flops=989e12, bandwidth=4800e9, links=450e9),
}


def chip_of(devices: Sequence[Any]) -> Chip:
    """What one of the devices is; nan for what is not known of its kind. CPU devices share the machine's memory.

    Of a GPU that is present, memory is what JAX may use of it, which is less than there is.
    """
    unknown = Chip(memory=math.nan, flops=math.nan, bandwidth=math.nan, links=math.nan)
    chip = CHIPS.get(devices[0].device_kind, unknown)
    if devices[0].platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    elif devices[0].platform == "gpu":
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", chip.memory)
    else:
        memory = chip.memory
    return dataclasses.replace(chip, memory=memory)


def ranked(plans: Sequence[Plan], chip: Chip) -> list[Plan]:
    """The best first: those that fit, by the time of a step, or by memory where nothing is known of times."""

    def badness(plan: Plan) -> tuple[bool, float, float]:
        seconds = plan.step_seconds(chip)[1]
        return not plan.fits(chip), seconds if math.isfinite(seconds) else 0.0, plan.memory

    return sorted(plans, key=badness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One compiled program on one chip. memory: bytes at its peak, with ``beside`` (what else is resident).

    runs: how often it runs in a step of the stage. seconds: to compile.
    """

    name: str
    memory: int
    beside: int
    counts: hlo.Counts
    runs: int
    seconds: float

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds of one step that matrix products, memory and links each need at least."""
        wire = sum(collective.wire_bytes for collective in self.counts.collectives)
        return {
            "compute": self.runs * self.counts.flops / chip.flops,
            "memory": self.runs * self.counts.traffic / chip.bandwidth,
            "links": self.runs * wire / chip.links,
        }

    def communication(self) -> dict[str, float]:
        """Kind -> bytes that a chip sends in one run."""
        total: dict[str, float] = collections.defaultdict(float)
        for collective in self.counts.collectives:
            total[collective.kind] += collective.wire_bytes
        return dict(total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage on one mesh. useful_flops: of a whole step on all chips, what the model needs and nothing twice.

    whole: parameters that the mesh was to split and does not.
    """

    mesh: dict[str, int]
    costs: tuple[Cost, ...]
    useful_flops: float
    whole: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes a chip needs, in the program that needs most."""
        return max(cost.memory + cost.beside for cost in self.costs)

    def fits(self, chip: Chip) -> bool:
        return self.memory <= chip.memory

    def step_seconds(self, chip: Chip) -> tuple[float, float]:
        """At best, where communication hides behind everything else, and where none of it does."""
        times = [cost.times(chip) for cost in self.costs]
        best = sum(max(found.values()) for found in times)
        return best, sum(max(found["compute"], found["memory"]) + found["links"] for found in times)

    def utilisation(self, chip: Chip) -> tuple[float, float]:
        """Model FLOPs utilisation that goes with ``step_seconds`` (Chowdhery et al. 2022, PaLM, appendix B)."""
        chips = math.prod(self.mesh.values())
        best, worst = self.step_seconds(chip)
        return tuple(self.useful_flops / (seconds * chips * chip.flops) for seconds in (best, worst))


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice that need not be there, as "v5e:4x4"; "here": those that are there.

    Raises:
      InputError: the compiler for TPUs is not installed, or there is no such slice.
    """
    if topology == "here":
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={topology} needs the TPU's compiler, and the libtpu wheel is not installed; "
            "pip install 'rlhf_jax[plan]', or give --topology=here"
        )
    # Compiling needs no TPU: no metadata server is asked for one, and other processes may do the same.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # The two cores of a v4 chip are one device, as they are when a program runs.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # the plugin raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology={topology} is no slice that the TPU's compiler knows ({reason}); give one as v5e:4x4"
        ) from None


def meshes_of(devices: int, *, rows: int, heads: int, most_tensor: int = 8) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices over which the rows of a micro-batch and the key/value heads divide."""
    for tensor in (size for size in range(1, most_tensor + 1) if devices % size == 0 and heads % size == 0):
        if rows % (devices // tensor):
            continue
        over_rows = devices // tensor
        for fsdp in (size for size in range(over_rows, 0, -1) if over_rows % size == 0):
            yield {"data": over_rows // fsdp, "fsdp": fsdp, "tensor": tensor}


def cost_of(
    name: str, compiled: Any, text: str, *, beside: int, runs: int, loop_steps: int, seconds: float
) -> Cost:
    """What a compiled program needs.

    Args:
      name: of the program.
      compiled: ``jit(...).lower(...).compile()``.
      text: of the compiled program, optimised HLO.
      beside: bytes a chip holds beside its arguments while it runs.
      runs: how often it runs in a step.
      loop_steps: how often its loops run that end when data say so.
      seconds: that it took to compile.
    """
    memory = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    counts = hlo.count(text, unknown_trips=loop_steps)
    return Cost(name=name, memory=needed, beside=beside, counts=counts, runs=runs, seconds=seconds)


def resident_bytes(*trees: Any) -> int:
    """Bytes a chip holds of arrays, or of shapes, that have a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _item_bytes(leaf.dtype)
        for leaf in jax.tree.leaves(trees)
    )


def _item_bytes(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
