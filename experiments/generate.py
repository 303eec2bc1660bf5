"""Samples from a model: prompts from flags, a file or standard input; text or JSON lines on standard output.

    python -m experiments.generate --model=runs/ppo --prompt="praise the cast ." --num_samples=4
    python -m experiments.generate --model=exported/ppo --prompts_file=prompts.txt --greedy --jsonl > answers.jsonl
    echo "Once upon a time" | python -m experiments.generate --model=EleutherAI/pythia-70m --stop=. --max_new_tokens=40

A sample depends on --seed, on the place of its prompt, on its own number and on --num_samples, and on nothing else: not
on --batch_size, on --refill, or on the other prompts. A JSON line has: source, prompt, sample (from 0), response,
ended_by (eos, stop or length), tokens (how many were drawn, EOS included), and log_prob and policy_log_prob, in nats,
of the whole response: under what it was drawn from, and under the model at that temperature with nothing left out. The
text of a response goes up to the stop string, and neither it nor EOS is printed; tokens and log-probs count both.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags

from experiments import launch
from rlhf_jax.data import conversations, readers
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Prompt
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.prompts import bucket_width, pad_prompts
from rlhf_jax.sampling.refill import generate_refilled
from rlhf_jax.sampling.stop_strings import first_match, stop_table
from rlhf_jax.stages.handoffs import load_model
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.training.interrupt import Interrupted

MODEL = flags.DEFINE_string(
    "model",
    None,
    "The --workdir of a finished run, a Hugging Face directory, or the name of a repository on the Hugging Face hub.",
    required=True,
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given many times.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "Prompts: a .txt with one a line, or rows with prompt or messages (.jsonl, .json, .parquet; .gz too). Without this "
    "and --prompt, lines of standard input.",
)
CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Prompts of text are what a user says: the tokenizer's chat template goes around them. Rows with messages always "
    "go through it.",
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a response at most, EOS included.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Responses to each prompt.", lower_bound=1)
GREEDY = flags.DEFINE_bool("greedy", False, "The most probable token every time, instead of a draw.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from that many most probable tokens; 0: from all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the most probable tokens of that total probability.")
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least that many times as probable as the most probable one."
)
STOP = flags.DEFINE_multi_string(
    "stop",
    [],
    "A string that ends a response, wherever in a token it begins or ends; may be given many times. In bash a line "
    "break is --stop=$'\\n'.",
)
SEED = flags.DEFINE_integer("seed", 0, "What the draws come from.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Responses sampled at once.", lower_bound=1)
REFILL = flags.DEFINE_bool(
    "refill",
    False,
    "A row that has ended takes the next prompt at once, instead of waiting for the longest of its batch; on one "
    "device. Nothing is printed before all have ended.",
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    "compute",
    ["compute", "float32", "bfloat16"],
    "Of keys and values kept; compute: as --dtype.",
)
JSONL = flags.DEFINE_bool("jsonl", False, "Print one JSON object a response instead of text.")


def main(stop):
    sampling = SamplingConfig(
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        greedy=GREEDY.value,
        cache_dtype=CACHE_DTYPE.value,
    )
    rows = read_prompts()
    mesh = meshes.data_mesh(1 if REFILL.value else None)
    # The directory of a run is where a stage writes; nothing is written here.
    here = Run(workdir=pathlib.Path(), stage="generate", mesh=mesh, parallelism="jit", stop=stop)
    model = load_model(MODEL.value, here)
    if "head" in model.params:
        raise InputError(f"--model={MODEL.value} is a reward model; give a policy")
    config = dataclasses.replace(model.config, compute_dtype=DTYPE.value)
    room = config.max_length - sampling.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the context of "
            f"{config.max_length} tokens of {MODEL.value}; give at most {config.max_length - 1}"
        )
    encoded = [encode(model.tokenizer, row, room) for row in rows]
    items = [(prompt, number) for prompt in range(len(rows)) for number in range(NUM_SAMPLES.value)]
    # Rows divide over devices; with --refill all of them are one queue.
    size = len(items) if REFILL.value else -(-min(BATCH_SIZE.value, len(items)) // mesh.size) * mesh.size
    sample = make_sampler(config, model, mesh, sampling, encoded, size)
    for start in range(0, len(items), size):
        if stop.requested:
            raise Interrupted(
                f"stopped by {stop.requested}: what was printed is whole; run it again for the rest"
            )
        batch = items[start : start + size]
        for (prompt, number), found in zip(batch, sample(batch), strict=True):
            show({"source": rows[prompt].source, "prompt": rows[prompt].prompt, "sample": number} | found)


def read_prompts():
    """The prompts, in order: those of --prompt, then those of the file; or those of standard input."""
    rows = [Prompt(prompt=text, source=f"--prompt {i + 1}") for i, text in enumerate(PROMPT.value)]
    if PROMPTS_FILE.value is not None:
        rows += readers.read_prompts(PROMPTS_FILE.value)[0]
    elif not rows:
        if sys.stdin.isatty():
            print("prompts, one a line; Ctrl-D when done:", file=sys.stderr)
        lines = enumerate(sys.stdin.read().splitlines(), 1)
        rows = [
            Prompt(prompt=line, source=f"line {i} of standard input") for i, line in lines if line.strip()
        ]
    if not rows:
        raise InputError(
            "there is no prompt: give --prompt=..., --prompts_file=..., or lines on standard input"
        )
    return rows


def encode(tokenizer, row, room):
    """The ids of a prompt, at most ``room``."""
    if row.messages or CHAT.value:
        ids = conversations.encode_turns(tokenizer, row.messages or (("user", row.prompt),), row.source)
    else:
        ids = tokenizers.encode_prompt(tokenizer, row.prompt)
    if not ids:
        raise InputError(f"{row.source} has no tokens, and the tokenizer has no BOS; give some text")
    if len(ids) > room:
        raise InputError(
            f"{row.source} has {len(ids)} tokens, and with --max_new_tokens={MAX_NEW_TOKENS.value} the context of "
            f"{MODEL.value} has room for {room}; shorten it or lower --max_new_tokens"
        )
    return ids


def make_sampler(config, model, mesh, sampling, encoded, size):
    """``sample(items)``: what was drawn for up to ``size`` (prompt, sample), as the fields of ``describe``."""
    tokenizer, parameters = model.tokenizer, {"decoder": model.params["decoder"]}
    ids = {"eos_id": tokenizers.eos_id(tokenizer), "pad_id": tokenizers.pad_id(tokenizer)}
    pieces, table = [], None
    if STOP.value:
        pieces = tokenizers.token_bytes(tokenizer)
        table = stop_table(
            STOP.value,
            pieces,
            vocab_size=config.vocab_size,
            eos_id=ids["eos_id"],
            max_new_tokens=sampling.max_new_tokens,
        )
    draw = functools.partial(generate_refilled, slots=BATCH_SIZE.value) if REFILL.value else generate
    compiled = jax.jit(functools.partial(draw, config, sampling=sampling, **ids))

    def sample(items):
        # A last batch that is not full repeats its first row, so that nothing is compiled for it.
        filled = items + items[:1] * (size - len(items))
        prompts = [encoded[prompt] for prompt, _ in filled]
        width = bucket_width(max(map(len, prompts)), limit=config.max_length - sampling.max_new_tokens)
        numbers = np.array([prompt * NUM_SAMPLES.value + number for prompt, number in filled], np.int32)
        arrays = *pad_prompts(prompts, width=width, pad_id=ids["pad_id"]), numbers
        tokens, token_mask, row_ids = meshes.put_rows(mesh, arrays)
        key = jax.random.key(SEED.value)
        rollout = compiled(parameters, tokens, token_mask, key, row_ids=row_ids, stop_table=table)
        rollout = jax.device_get(rollout)
        return [describe(rollout, row, tokenizer, pieces) for row in range(len(items))]

    return sample


def describe(rollout, row, tokenizer, pieces):
    """The text of one response, how it ended, and its log-probs."""
    mask = rollout.response_mask[row]
    said = rollout.tokens[row, -len(mask) :][mask].tolist()
    (text,) = tokenizers.decode_rows(tokenizer, rollout.tokens[row, None, -len(mask) :], mask[None])
    ended_by = "length"
    if rollout.terminated[row] and said[-1] == tokenizers.eos_id(tokenizer):
        ended_by = "eos"
    elif rollout.terminated[row]:
        ended_by, raw = "stop", b"".join(pieces[token] for token in said)
        # Counted from the end: some tokenizers drop a blank at the start of a text.
        text = text[: max(0, len(text) - len(raw[first_match(raw, STOP.value) :].decode("utf-8", "replace")))]
    return {
        "response": text,
        "ended_by": ended_by,
        "tokens": len(said),
        "log_prob": float(rollout.log_probs[row].sum()),
        "policy_log_prob": float(rollout.policy_log_probs[row].sum()),
    }


def show(found):
    if JSONL.value:
        print(json.dumps(found, ensure_ascii=False), flush=True)
        return
    ending = {"eos": "ended by itself", "stop": "ended by a stop string", "length": "cut by length"}
    print(
        f"=== {found['source']}, sample {found['sample']}: {found['tokens']} tokens, {ending[found['ended_by']]}"
    )
    print(found["prompt"])
    print(f"--- {found['response']}", flush=True)


if __name__ == "__main__":
    launch.launch(main)
