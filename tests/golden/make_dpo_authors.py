"""Writes dpo_authors.json: the DPO authors' own functions, from logits to loss, on fixed random input.

    git clone https://github.com/eric-mitchell/direct-preference-optimization
    python tests/golden/make_dpo_authors.py direct-preference-optimization/trainers.py

Recorded at commit 5815fab. Needs torch; the module's other imports (wandb, FSDP) are not: only the two functions are
compiled.
"""

import ast
import json
import pathlib
import sys
import typing

import numpy as np
import torch
import torch.nn.functional


def functions(path, *names):
    tree = ast.parse(pathlib.Path(path).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope = {"torch": torch, "F": torch.nn.functional, **vars(typing)}
    exec(compile(tree, path, "exec"), scope)
    return [scope[name] for name in names]


def main():
    dpo_loss, batch_log_probs = functions(sys.argv[1], "dpo_loss", "_get_batch_logps")
    rng = np.random.default_rng(18)
    rows, length, vocabulary = 4, 6, 6  # two pairs, the chosen first
    logits, reference = rng.standard_normal((2, rows, length, vocabulary)).astype(np.float32)
    tokens = rng.integers(0, vocabulary, (rows, length))
    mask = np.arange(length)[None] < np.array([6, 3, 4, 5])[:, None]
    mask[:, :2] = False  # the prompt
    labels = torch.tensor(np.where(mask, tokens, -100))
    leaf = torch.tensor(logits, requires_grad=True)
    policy, ref = batch_log_probs(leaf, labels), batch_log_probs(torch.tensor(reference), labels)
    losses, chosen, rejected = dpo_loss(*policy.chunk(2), *ref.chunk(2), beta=0.3)
    losses.mean().backward()
    golden = {
        "commit": "5815fab23a10509b7ee7088be27f8979bd26c96a",
        "inputs": {"logits": logits, "reference": reference, "tokens": tokens, "mask": mask, "beta": 0.3},
        "log_probs": policy.tolist(),
        "losses": losses.tolist(),
        "rewards": [chosen.tolist(), rejected.tolist()],
        "gradient": leaf.grad.tolist(),
    }
    path = pathlib.Path(__file__).parent / "dpo_authors.json"
    path.write_text(json.dumps(golden, default=lambda array: array.tolist()) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
