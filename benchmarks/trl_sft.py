"""TRL's SFTTrainer at the shape of ``benchmarks.speed --task=sft``; run by an interpreter that has trl and torch.

    <python with trl> benchmarks/trl_sft.py --batch 8 --seq 256 --steps 5

A random Llama of the same shape, float32, on CPU, the trainer's own defaults except gradient checkpointing,
which is off because recomputation would only slow it. Steps are timed between the trainer's own callbacks.
Prints one JSON line.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
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

from benchmarks.shapes import SIZES  # noqa: E402

WARM_UP = 2


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=size["vocab_size"],
            hidden_size=size["width"],
            num_hidden_layers=size["num_layers"],
            num_attention_heads=size["num_heads"],
            num_key_value_heads=size["num_kv_heads"],
            intermediate_size=size["mlp_width"],
            max_position_embeddings=arguments.seq,
            tie_word_embeddings=True,
        )
    )
    steps = WARM_UP + arguments.steps
    rows = torch.randint(3, size["vocab_size"], (arguments.batch * steps, arguments.seq)).tolist()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
    )
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=arguments.batch,
            max_length=arguments.seq,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    median = statistics.median(clock.seconds[WARM_UP:])
    print(
        json.dumps(
            {
                "library": "trl",
                "task": "sft",
                "size": arguments.size,
                "batch": arguments.batch,
                "seq": arguments.seq,
                "median_s": round(median, 4),
                "tokens_per_s": round(arguments.batch * arguments.seq / median, 1),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "trl": trl.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
