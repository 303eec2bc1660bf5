"""Writes peft.json: adapters that PEFT made for small models at fixed weights, and the logits it gives with them.

    python -m pip install torch transformers peft
    python tests/models/make_peft.py

Weights are not stored: both sides fill them by ``fill``, in the order of the tensors' names.
"""

import importlib.metadata
import json
import pathlib
import tempfile

import numpy as np

MODELS = {
    "llama": {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "tie_word_embeddings": True,
    },
    "gpt2": {"vocab_size": 11, "n_embd": 8, "n_inner": 12, "n_layer": 2, "n_head": 2, "n_positions": 16},
}
TARGETS = {"llama": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], "gpt2": ["c_attn", "mlp.c_fc"]}
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def fill(shapes):
    """Name -> float32 array, for names to shapes: nothing random, nothing regular."""
    return {
        name: (0.4 * np.sin(1.7 * (i + 1) * np.arange(1, 1 + np.prod(shape)) ** 1.1))
        .astype(np.float32)
        .reshape(shape)
        for i, (name, shape) in enumerate(sorted(shapes.items()))
    }


def set_weights(torch, module):
    named = dict(module.named_parameters())
    values = fill({name: tuple(p.shape) for name, p in named.items()})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.tensor(values[name]))


def make(family):
    import peft
    import safetensors.numpy
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **MODELS[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    set_weights(torch, model)
    fan = family == "gpt2"
    lora = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=fan
    )
    adapted = peft.get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        shapes = {
            name: value.shape
            for name, value in safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors").items()
        }
        fields = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
    values = {k: torch.tensor(v) for k, v in fill(shapes).items()}
    peft.set_peft_model_state_dict(adapted, values)
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor(IDS)).logits[0]
    return {"fields": fields, "shapes": shapes, "logits": logits.numpy().astype(float).tolist()}


if __name__ == "__main__":
    made = {family: make(family) for family in MODELS}
    made["versions"] = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    pathlib.Path(__file__).with_name("peft.json").write_text(json.dumps(made, indent=1) + "\n")
