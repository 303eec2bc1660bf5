"""Writes verl.json and openrlhf.json: what those libraries' own functions return on fixed random input.

Needs an environment of its own:

    python -m pip install torch==2.13.0 transformers tensordict omegaconf hydra-core orjson
    python -m pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_verl_openrlhf.py

Their engines (ray, vllm, deepspeed, ...) are not needed for arithmetic: imports of them are answered with mocks.
NeMo RL's wheel on the package index is empty; its published test values are in test_pins.py.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import pathlib
import sys
import unittest.mock

import numpy as np
import torch

ENGINES = {"ray", "deepspeed", "flash_attn", "vllm", "peft", "ring_flash_attn", "codetiming", "pylatexenc", "torchdata",
           "wandb", "liger_kernel", "cachetools", "uvloop", "fastapi", "starlette", "uvicorn", "aiohttp"}  # fmt: skip


class MockEngines(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ENGINES and not name.startswith(
            "flash_attn.ops"
        ):  # its kernels have a fallback
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return unittest.mock.MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(MockEngines())
from openrlhf.models.loss import DPOLoss, PairWiseLoss, PolicyLoss, ValueLoss  # noqa: E402
from openrlhf.models.utils import compute_approx_kl, compute_reward, log_probs_from_logits  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.torch_functional import masked_whiten  # noqa: E402

B, T, V = 4, 6, 7
RNG = np.random.default_rng(9)


def normal(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def log_probs(*shape):
    return -np.abs(normal(*shape)) - np.float32(0.05)


def mask_with_hole():
    mask = np.arange(T)[None] < np.array([T, 3, 5, 1])[:, None]
    mask[0, 2] = False
    return mask


def with_gradient(inputs, function, *leaves):
    leaves = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    loss = function(*leaves)
    loss.backward()
    return {"inputs": inputs, "loss": loss.item(), "gradients": [leaf.grad.tolist() for leaf in leaves]}


def policy_inputs():
    policy, advantages = log_probs(B, T), normal(B, T)
    policy[1, 0] += 30.0  # a log-ratio that both libraries cut at 20
    old = policy + normal(B, T, scale=0.3)
    old[1, 0] -= 31.0
    return {"policy": policy, "old": old, "advantages": advantages, "mask": mask_with_hole()}


def tensors(inputs):
    return {k: torch.tensor(v.astype(np.float32) if v.dtype == bool else v) for k, v in inputs.items()}


def verl_policy(mode, dual_clip):
    inputs = policy_inputs()
    t = tensors(inputs)
    options = {"cliprange": 0.2, "cliprange_low": 0.2, "cliprange_high": 0.28, "clip_ratio_c": dual_clip}
    return with_gradient(
        inputs,
        lambda policy: core_algos.compute_policy_loss(
            t["old"], policy, t["advantages"], t["mask"], loss_agg_mode=mode, **options
        )[0],
        inputs["policy"],
    )


def value_inputs():
    return {
        "values": normal(B, T),
        "old_values": normal(B, T),
        "returns": normal(B, T),
        "mask": mask_with_hole(),
    }


def kl_inputs():
    policy, ref = log_probs(B, T), log_probs(B, T)
    ref[0, 0], ref[1, 1] = policy[0, 0] - 30.0, policy[1, 1] + 30.0
    return {"policy": policy, "ref": ref}


def verl_kl(name):
    inputs = kl_inputs()
    ref = torch.tensor(inputs["ref"])
    values = core_algos.kl_penalty(torch.tensor(inputs["policy"]), ref, name).tolist()
    return {
        "values": values,
        **with_gradient(inputs, lambda p: core_algos.kl_penalty(p, ref, name).sum(), inputs["policy"]),
    }


def verl_gae():
    inputs = {"rewards": normal(B, T), "values": normal(B, T), "mask": mask_with_hole()}
    t = tensors(inputs)
    with unittest.mock.patch.object(core_algos.verl_F, "masked_whiten", lambda x, mask: x):
        raw, _ = core_algos.compute_gae_advantage_return(t["rewards"], t["values"], t["mask"], 0.9, 0.8)
    whitened, returns = core_algos.compute_gae_advantage_return(
        t["rewards"], t["values"], t["mask"], 0.9, 0.8
    )
    return {
        "inputs": inputs,
        "advantages": raw.tolist(),
        "returns": returns.tolist(),
        "whitened": whitened.tolist(),
    }


def verl_groups():
    rewards = np.concatenate([np.array([1.0, 2.0, 3.0, 2.0], np.float32), normal(4)])
    index = np.array(["a"] * 3 + ["alone"] + ["b"] * 4)
    ones = torch.ones(8, 1)
    arguments = torch.tensor(rewards)[:, None], ones, index
    estimators = {
        "grpo": core_algos.compute_grpo_outcome_advantage,
        "rloo": core_algos.compute_rloo_outcome_advantage,
    }
    out = {name: estimate(*arguments)[0][:, 0].tolist() for name, estimate in estimators.items()}
    dr = core_algos.compute_grpo_outcome_advantage(*arguments, norm_adv_by_std_in_grpo=False)[0]
    return {"inputs": {"rewards": rewards}, **out, "dr_grpo": dr[:, 0].tolist()}


def verl():
    golden = {"version": importlib.metadata.version("verl")}
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        golden[f"policy/{mode}"] = verl_policy(mode, dual_clip=1e9)
    golden["policy/dual-clip"] = verl_policy("token-mean", dual_clip=3.0)
    inputs = value_inputs()
    t = tensors(inputs)
    golden["value"] = with_gradient(
        inputs,
        lambda v: core_algos.compute_value_loss(v, t["returns"], t["old_values"], t["mask"], 0.5)[0],
        inputs["values"],
    )
    golden |= {f"kl/{name}": verl_kl(name) for name in ("k1", "k2", "k3", "k3+")}
    golden["gae"], golden["groups"] = verl_gae(), verl_groups()
    x = normal(B, T)
    mask = mask_with_hole()
    whitened = masked_whiten(torch.tensor(x), torch.tensor(mask).float())
    golden["whiten"] = {"inputs": {"x": x, "mask": mask}, "values": whitened.tolist()}
    return golden


def openrlhf_kl(name):
    inputs = kl_inputs()
    ref = torch.tensor(inputs["ref"])
    values = compute_approx_kl(torch.tensor(inputs["policy"]), ref, kl_estimator=name).tolist()
    return {"inputs": inputs, "values": values}


def openrlhf_direct(**options):
    names = "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"
    inputs = {name: normal(B) for name in names}
    refs = [torch.tensor(inputs[name]) for name in names[2:]]
    loss = DPOLoss(beta=0.3, **options)
    return with_gradient(inputs, lambda c, r: loss(c, r, *refs)[0], *(inputs[name] for name in names[:2]))


def openrlhf():
    golden = {"version": importlib.metadata.version("openrlhf")}
    golden["dpo"], golden["cdpo"] = openrlhf_direct(), openrlhf_direct(label_smoothing=0.1)
    golden["ipo"] = openrlhf_direct(ipo=True)
    for name, options in {
        "token": {},
        "sample": {"token_level_loss": False},
        "gspo": {"policy_loss_type": "gspo"},
    }.items():
        inputs = policy_inputs()
        t = tensors(inputs)
        loss = PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **options)
        golden[f"policy/{name}"] = with_gradient(
            inputs,
            lambda p, loss=loss, t=t: loss(p, t["old"], t["advantages"], t["mask"])[0],
            inputs["policy"],
        )
    inputs = value_inputs()
    t = tensors(inputs)
    golden["value"] = with_gradient(
        inputs,
        lambda v: ValueLoss(clip_eps=0.5)(v, t["old_values"], t["returns"], t["mask"]),
        inputs["values"],
    )
    inputs = {"chosen": normal(B), "rejected": normal(B), "margin": np.abs(normal(B))}
    golden["reward"] = with_gradient(
        inputs,
        lambda c, r: PairWiseLoss()(c, r, torch.tensor(inputs["margin"])),
        inputs["chosen"],
        inputs["rejected"],
    )
    golden |= {f"kl/{name}": openrlhf_kl(name) for name in ("k1", "k2", "k3")}
    mask = mask_with_hole()
    inputs = {"scores": normal(B), "kl": normal(B, T), "mask": mask}
    t = tensors(inputs)
    golden["penalized"] = {
        "inputs": inputs,
        "values": compute_reward(t["scores"], 0.2, t["kl"], t["mask"]).tolist(),
    }
    plain = np.arange(T)[None] < np.array([T, 3, 5, 1])[:, None]
    inputs = {"rewards": normal(B, T), "values": normal(B, T), "mask": plain}
    t = tensors(inputs)
    advantages, returns = RemoteExperienceMaker.get_advantages_and_returns(
        None, t["values"], t["rewards"], t["mask"], 0.9, 0.8
    )
    golden["gae"] = {"inputs": inputs, "advantages": advantages.tolist(), "returns": returns.tolist()}
    inputs = {"logits": normal(2, 3, V), "targets": RNG.integers(0, V, size=(2, 3))}
    golden["likelihood"] = {
        "inputs": inputs,
        "log_probs": log_probs_from_logits(*map(torch.tensor, inputs.values()), temperature=0.7).tolist(),
    }
    return golden


if __name__ == "__main__":
    for name, golden in {"verl": verl(), "openrlhf": openrlhf()}.items():
        path = pathlib.Path(__file__).parent / f"{name}.json"
        path.write_text(json.dumps(golden, default=lambda array: array.tolist()) + "\n")
        print(path, path.stat().st_size, "bytes")
