"""What a stage will need on a TPU slice, asked of the TPU's own compiler, with no TPU there.

    python -m experiments.plan --stage=sft --topology=v5e:4x4 --model=experiments/shapes/llama3_8b \\
        --compute_dtype=bfloat16 --remat=full --config.batch_size=64 --config.data.prompt_length=1024 \\
        --config.data.response_length=1024

It compiles the functions that the stage runs (the update; for stages that sample, sampling, scoring and advantages too)
and prints for each mesh that divides the slice: memory of a chip at its peak, beside what there is; the least time a
step can take, and the model FLOPs utilisation that goes with it, if communication hides behind everything else and if
none of it does. The best comes first. --mesh asks for one mesh, --json prints everything for a script, and
--topology=here plans for the devices that are present. Needs the wheel of the extra "plan".
"""

import os
import sys

# Compiling for a slice needs no device, and with its compiler installed JAX would look for one.
if "topology=here" not in " ".join(sys.argv).replace("topology here", "topology=here"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402

from experiments import launch, plan_programs  # noqa: E402
from rlhf_jax.errors import InputError  # noqa: E402
from rlhf_jax.models import huggingface  # noqa: E402
from rlhf_jax.parallel import mesh as meshes  # noqa: E402
from rlhf_jax.parallel import planner  # noqa: E402
from rlhf_jax.stages import config as configs  # noqa: E402


def _stage_of(arguments):
    """The stage that the command line names, before flags are read: --config takes its values when it is defined."""
    words = " ".join(arguments).replace("-stage ", "-stage=").split()
    named = [word.partition("=")[2] for word in words if word.lstrip("-").startswith("stage=")] or ["sft"]
    stage = _SHORT.get(named[-1], named[-1])
    return stage if stage in plan_programs.STAGES else "sft"


_SHORT = {"rm": "reward_model"}
CONFIG = launch.define_config(_stage_of(sys.argv))
STAGE = flags.DEFINE_enum(
    "stage",
    "sft",
    [*plan_programs.STAGES, *_SHORT],
    "Whose functions, and whose config file --config is by default. rm is short for reward_model.",
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice, as v5e:4x4, v5p:4x4x8, v6e:2x4; or here.", required=True
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    "Hugging Face directory (config.json is enough): the shape of every role. sft: in place of --config.model.path.",
)
COMPUTE_DTYPE = flags.DEFINE_enum(
    "compute_dtype", None, ["float32", "bfloat16"], "In place of the model's own."
)
REMAT = flags.DEFINE_enum("remat", None, ["none", "full"], "In place of the model's own.")
ATTENTION = flags.DEFINE_enum("attention", None, ["own", "xla", "splash"], "In place of the model's own.")
MESH = launch.define_mesh()
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def main(stop):
    del stop
    stage = _stage_of(sys.argv)
    config = configs.from_dict(plan_programs.STAGES[stage], CONFIG.value.to_dict())
    path = MODEL.value or (config.model.path if stage == "sft" else "")
    if not path:
        raise InputError(
            "--model is not given; give a Hugging Face directory, as experiments/shapes/llama3_8b"
        )
    model = huggingface.read_config(path)
    asked = {"compute_dtype": COMPUTE_DTYPE.value, "remat": REMAT.value, "attention": ATTENTION.value}
    model = dataclasses.replace(model, **{name: value for name, value in asked.items() if value is not None})
    devices = planner.topology_devices(TOPOLOGY.value)
    chip = planner.chip_of(devices)
    plans, refused = [], {}
    for number, mesh in enumerate(tried := list(_meshes(devices, config, model)), start=1):
        print(f"{number}/{len(tried)} {_name(mesh.shape)}", file=sys.stderr, flush=True)
        try:
            plans.append(plan_programs.plan(stage, mesh, config, model))
        except plan_programs.DoesNotFit as error:
            refused[_name(mesh.shape)] = str(error)
    plans = planner.ranked(plans, chip)
    if JSON.value:
        print(json.dumps(_known(_as_json(plans, refused, chip, devices)), indent=1, allow_nan=False))
    else:
        _print_table(plans, refused, chip, devices)


def _meshes(devices, config, model):
    if MESH.value:
        yield meshes.make_mesh(MESH.value, devices)
        return
    rows = plan_programs.rows_of_an_update(config)
    found = list(planner.meshes_of(len(devices), rows=rows, heads=model.num_kv_heads))
    if not found:
        raise InputError(
            f"no mesh of {len(devices)} devices divides micro-batches of {rows} rows and {model.num_kv_heads} "
            "key/value heads; change --config.batch_size or --config.num_microbatches until the rows are a multiple of "
            f"{len(devices)}"
        )
    for sizes in found:
        yield meshes.mesh_of(sizes, devices)


def _name(shape):
    return ",".join(f"{name}:{size}" for name, size in shape.items() if size > 1) or "data:1"


def _print_table(plans, refused, chip, devices):
    print(
        f"{STAGE.value} on {TOPOLOGY.value}: {len(devices)} x {devices[0].device_kind}, {_gib(chip.memory)} each; "
        f"jax {jax.__version__}"
    )
    print(
        f"{'mesh':28}{'needs':>11}{'spare':>11}{'step':>16}{'MFU':>12}{'compute':>9}{'memory':>9}{'links':>9}{'compiled':>10}"
    )
    for plan in plans:
        best, worst = plan.step_seconds(chip)
        high, low = plan.utilisation(chip)
        times = [cost.times(chip) for cost in plan.costs]
        parts = [sum(found[part] for found in times) for part in ("compute", "memory", "links")]
        print(
            f"{_name(plan.mesh):28}{_gib(plan.memory):>11}{_gib(chip.memory - plan.memory):>11}"
            f"{f'{best:.3g}-{worst:.3g} s':>16}{f'{low:.0%}-{high:.0%}':>12}"
            + "".join(f"{seconds:>8.3g}s" for seconds in parts)
            + f"{sum(cost.seconds for cost in plan.costs):>9.0f}s"
        )
    for name, reason in refused.items():
        print(f"{name:28}does not fit: {reason}")
    for plan in plans:
        for cost in plan.costs:
            if cost.counts.unknown_loops:
                print(
                    f"{_name(plan.mesh)}, {cost.name}: {cost.counts.unknown_loops} loops end when data say so; counted "
                    f"as running once for each of the tokens of --config.data.response_length"
                )
    for plan in plans[:1]:
        print(f"\nthe programs of {_name(plan.mesh)}, one run each on one chip:")
        for cost in plan.costs:
            sent = ", ".join(f"{kind} {_gib(size)}" for kind, size in sorted(cost.communication().items()))
            print(
                f"  {cost.name}: {cost.counts.flops:.3g} FLOPs, {_gib(cost.counts.traffic)} to and from memory, "
                f"needs {_gib(cost.memory + cost.beside)}, {cost.runs} a step; sends {sent or 'nothing'}"
            )
        for line in plan.whole:
            print(f"  {line}")


def _as_json(plans, refused, chip, devices):
    def one(plan):
        best, worst = plan.step_seconds(chip)
        high, low = plan.utilisation(chip)
        return {
            "mesh": dict(plan.mesh),
            "memory_bytes": plan.memory,
            "fits": plan.fits(chip),
            "step_seconds": [best, worst],
            "mfu": [low, high],
            "whole": list(plan.whole),
            "programs": [
                {
                    "name": cost.name,
                    "runs": cost.runs,
                    "memory_bytes": cost.memory + cost.beside,
                    "flops": cost.counts.flops,
                    "traffic_bytes": cost.counts.traffic,
                    "sent_bytes": cost.communication(),
                    "seconds": cost.times(chip),
                    "compile_seconds": cost.seconds,
                    "loops_of_unknown_length": cost.counts.unknown_loops,
                }
                for cost in plan.costs
            ],
        }

    return {
        "stage": STAGE.value,
        "topology": TOPOLOGY.value,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "plans": [one(plan) for plan in plans],
        "refused": refused,
    }


def _known(value):
    """As JSON has it: null for a number that is not known (of a chip that the planner has no speeds of)."""
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gib(size):
    return f"{size / 2**30:.2f} GiB" if math.isfinite(size) else "?"


if __name__ == "__main__":
    launch.launch(main)
