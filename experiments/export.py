"""From a run to a Hugging Face directory that transformers and vLLM load, tokenizer included.

    python -m experiments.export --run=runs/ppo --to=exported/ppo
    python -m experiments.export --run=runs/reward_model --to=exported/reward_model --dtype=bfloat16
    python -m experiments.export --run=runs/both:brief --to=exported/brief    # one head of several objectives
    python -m experiments.export --run=runs/dpo_lora --to=exported/adapter --adapter_on=exported/sft

A policy becomes the language model of its family; a reward model becomes ...ForSequenceClassification with one label,
whose scores are ours but for the constant that config.json keeps as score_bias; of a process reward model the mark that
divides steps is not written. A policy's directory is also one that --init_from and --config.model.path take. With
--adapter_on, a run with config.lora becomes PEFT's two files, which name the Hugging Face directory (or hub id) of what
it was trained on.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from experiments import launch
from rlhf_jax import checkpoints
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.models import huggingface, lora
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import config as configs
from rlhf_jax.stages.adapters import LoraOptions
from rlhf_jax.stages.handoffs import Model, check_one_head, load_handoff_model, of_objective
from rlhf_jax.stages.run_directory import split_objective

RUN = flags.DEFINE_string("run", None, "Directory of a finished run.", required=True)
TO = flags.DEFINE_string("to", None, "Directory to write; must be new or empty.", required=True)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What parameters are rounded to."
)

ADAPTER_ON = flags.DEFINE_string(
    "adapter_on",
    "",
    "Write the adapter alone, as PEFT does, on this Hugging Face directory or hub id; empty: the whole model.",
)


def main(stop):
    del stop  # nothing here is worth resuming
    target = pathlib.Path(TO.value)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--to={target} is there already; give a new or an empty directory")
    if ADAPTER_ON.value:
        write_adapter(target)
        return
    directory, objective = split_objective(RUN.value)
    model = of_objective(load_handoff_model(directory), objective)
    tokenizer = model.tokenizer
    ids = {
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizers.eos_id(tokenizer),
        "pad_id": tokenizers.pad_id(tokenizer),
        "dtype": DTYPE.value,
    }
    if "ensemble_offsets" in model.facts:
        raise InputError(
            f"--run={RUN.value} is an ensemble of reward models, for which there is no Hugging Face layout; give a run "
            "of experiments.reward_model with config.members=1"
        )
    check_one_head(model)
    if "head" in model.params:
        offset = float(model.facts.get("reward_offset", 0.0))
        huggingface.save_pretrained_scalar(target, model.config, model.params, offset=offset, **ids)
    else:
        huggingface.save_pretrained(target, model.config, model.params, **ids)
    tokenizers.save_tokenizer(tokenizer, target)
    print(f"wrote {target}", file=sys.stderr)


def write_adapter(target):
    if flags.FLAGS["dtype"].present:
        raise InputError("--dtype is not for adapters, which stay float32; leave it out")
    directory, objective = split_objective(RUN.value)
    handoff, location = checkpoints.load_handoff(directory)
    if not checkpoints.has_adapter(location):
        raise InputError(f"--run={RUN.value} was trained whole and has no adapter; leave --adapter_on out")
    trained = checkpoints.restore_params(location, name=checkpoints.ADAPTER)
    settings = configs.from_dict(LoraOptions, handoff.config["lora"], f"{location}: lora").settings
    shape = ModelConfig.from_dict(handoff.model)
    whole = Model(config=shape, params=trained, tokenizer=None, origin=directory, facts=handoff.facts)
    model = of_objective(whole, objective)
    check_one_head(model)
    head = model.params.get("head")
    if head is not None:
        head = {
            "kernel": head["kernel"],
            "bias": head["bias"] - float(model.facts.get("reward_offset", 0.0)),
        }
    lora.save_adapter(target, shape, trained["adapter"], settings, base_model=ADAPTER_ON.value, head=head)
    print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    launch.launch(main)
