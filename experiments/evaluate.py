"""Measures policies side by side: proxy, gold, KL to SFT, length, distinct-2, and best-of-n of the SFT policy.

    python -m experiments.evaluate --workdir=runs/evaluate --init_from=runs/sft --reward_from=runs/reward_model \\
        --policies=ppo=runs/ppo,dpo=runs/dpo
"""

from absl import flags

from experiments import launch, table
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import evaluate

CONFIG = launch.define_config("evaluate")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT: the reference, and the policy best-of-n draws from."
)
REWARD_FROM = flags.DEFINE_string(
    "reward_from", None, "Run directory of the reward model: the proxy.", required=True
)
POLICIES = flags.DEFINE_list("policies", [], "Comma-separated name=run directory, one a policy.")
MESH = launch.define_mesh()


def main(stop):
    config = configs.from_dict(evaluate.Config, CONFIG.value.to_dict())
    unnamed = [item for item in POLICIES.value if "=" not in item]
    if unnamed:
        raise InputError(f"--policies has {unnamed[0]!r}; write name=run directory")
    named = [item.split("=", 1)[0] for item in POLICIES.value]
    taken = [name for name in named if name in ("sft", "best_of_n") or named.count(name) > 1]
    if taken:
        raise InputError(
            f"--policies names {taken[0]!r} twice, or takes a name of the table's own; choose another"
        )
    summary = evaluate.run(
        config,
        WORKDIR.value,
        reference_from=INIT_FROM.value,
        reward_from=REWARD_FROM.value,
        policies_from=dict(item.split("=", 1) for item in POLICIES.value),
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    print(table.policies(summary))
    print(report.write_report(WORKDIR.value))


if __name__ == "__main__":
    launch.launch(main, evaluate.Config)
