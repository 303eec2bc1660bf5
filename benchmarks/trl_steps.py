"""TRL's trainers, and transformers' generate, at the shapes of ``benchmarks.speed``; needs trl and torch.

PPO left TRL after 1.12, so that ``--task=ppo`` needs that version and every other task 1.16.

    <python with trl> benchmarks/trl_steps.py --task dpo --batch 4 --seq 256 --steps 5

A random Llama of the same shape, float32, on CPU; the trainers' own defaults except gradient checkpointing, which is
off because recomputation would only slow it. Steps are timed between the trainer's own callbacks; a step of GRPO is one
whole iteration, sampling included. Prints one JSON line, in which tokens are counted as ``benchmarks.speed`` counts.
"""

import os
import pathlib
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from benchmarks import peer  # noqa: E402
from benchmarks.shapes import SIZES  # noqa: E402

GROUP = 8


class Clock(transformers.TrainerCallback):
    """Seconds from the end of one step to the end of the next: what happens between steps (sampling) counts."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self):
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def make_model(size, seq, *, scalar=False):
    config = transformers.LlamaConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["width"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"],
        intermediate_size=size["mlp_width"],
        max_position_embeddings=seq,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        **({"num_labels": 1} if scalar else {}),
    )
    kind = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    # Through a directory: GRPO's trainer loads its reference from where the model came from.
    directory = tempfile.mkdtemp()
    kind(config).save_pretrained(directory)
    return kind.from_pretrained(directory)


def make_tokenizer(size):
    """One token a word: "w17" is 17, so that a text of n words has n tokens."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size["vocab_size"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


def ids(size, rows, length):
    return torch.randint(3, size["vocab_size"], (rows, length)).tolist()


def text(row):
    return " ".join(f"w{i}" for i in row)


def shared(steps, batch):
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def sft(size, batch, seq, new, steps, clock):
    trainer = trl.SFTTrainer(
        model=make_model(size, seq),
        args=trl.SFTConfig(max_length=seq, **shared(steps, batch)),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids(size, batch * steps, seq)}),
        processing_class=make_tokenizer(size),
        callbacks=[clock],
    )
    return trainer, batch * seq


def dpo(size, batch, seq, new, steps, clock):
    half = seq // 2
    rows = {
        "prompt": [text(row) for row in ids(size, batch * steps, half)],
        # One word less: the trainer adds EOS.
        "chosen": [" " + text(row) for row in ids(size, batch * steps, seq - half - 1)],
        "rejected": [" " + text(row) for row in ids(size, batch * steps, seq - half - 1)],
    }
    trainer = trl.DPOTrainer(
        model=make_model(size, seq),
        args=trl.DPOConfig(max_length=seq, **shared(steps, batch)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=make_tokenizer(size),
        callbacks=[clock],
    )
    return trainer, 2 * batch * seq


def rm(size, batch, seq, new, steps, clock):
    rows = {side: ids(size, batch * steps, seq) for side in ("chosen_ids", "rejected_ids")}
    trainer = trl.RewardTrainer(
        model=make_model(size, seq, scalar=True),
        args=trl.RewardConfig(max_length=seq, **shared(steps, batch)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=make_tokenizer(size),
        callbacks=[clock],
    )
    return trainer, 2 * batch * seq


def grpo(size, batch, seq, new, steps, clock):
    trainer = trl.GRPOTrainer(
        model=make_model(size, seq),
        reward_funcs=lambda completions, **rest: [float(len(set(c)) % 7) for c in completions],
        args=trl.GRPOConfig(
            num_generations=GROUP,
            max_completion_length=new,
            generation_kwargs={"min_new_tokens": new},
            beta=0.04,
            **shared(steps, batch),
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [text(row) for row in ids(size, batch * steps, seq - new)]}
        ),
        processing_class=make_tokenizer(size),
        callbacks=[clock],
    )
    return trainer, batch * seq


def ppo(size, batch, seq, new, steps, clock):
    """Four roles and four epochs over one minibatch, as ``benchmarks.speed`` has them."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        model=make_model(size, seq),
        ref_model=make_model(size, seq),
        reward_model=make_model(size, seq, scalar=True),
        value_model=make_model(size, seq, scalar=True),
        args=PPOConfig(
            response_length=new,
            num_ppo_epochs=4,
            num_mini_batches=1,
            num_sample_generations=0,
            temperature=1.0,
            total_episodes=batch * steps,
            **{name: value for name, value in shared(steps, batch).items() if name != "max_steps"},
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids(size, batch * steps, seq - new)}),
        processing_class=make_tokenizer(size),
        callbacks=[clock],
    )
    return trainer, batch * seq


def generate(size, batch, seq, new, steps):
    """Seconds of each of ``steps`` calls of ``model.generate``."""
    model = make_model(size, seq).eval()
    prompts = torch.tensor(ids(size, batch, seq - new))
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_k=0,
            )
        seconds.append(time.perf_counter() - started)
    return seconds, batch * new


def main():
    trained = {"sft": sft, "dpo": dpo, "rm": rm, "grpo": grpo, "ppo": ppo}
    arguments = peer.arguments_of(__doc__, [*trained, "gen"])
    torch.manual_seed(0)
    steps = peer.WARM_UP + arguments.steps
    shape = SIZES[arguments.size], arguments.batch, arguments.seq, arguments.new, steps
    if arguments.task == "gen":
        seconds, tokens = generate(*shape)
    else:
        clock = Clock()
        trainer, tokens = trained[arguments.task](*shape, clock)
        trainer.train()
        seconds = clock.seconds
    peer.print_result(
        "transformers" if arguments.task == "gen" else "trl",
        arguments,
        seconds,
        tokens,
        trl=trl.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    main()
