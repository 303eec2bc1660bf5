"""A process reward model that only chooses: exact match of best-of-n and of a step beam, with as many draws.

    python -m experiments.search --workdir=runs/arithmetic/search --policy_from=runs/arithmetic/sft \\
        --reward_from=runs/arithmetic/process

Prints, and leaves in summary.json, the share of held-out sums that are answered right: by one response, by the best of
n by the model, by any of n, and by a beam that keeps --config.width of --config.width times --config.expansions steps.
"""

from absl import flags

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import search

CONFIG = launch.define_config("search")
WORKDIR = launch.define_workdir()
POLICY_FROM = flags.DEFINE_string("policy_from", None, "Run directory of the policy.", required=True)
REWARD_FROM = flags.DEFINE_string(
    "reward_from", None, "Run directory of the process reward model.", required=True
)
MESH = launch.define_mesh()


def main(stop):
    summary = search.run(
        configs.from_dict(search.Config, CONFIG.value.to_dict()),
        WORKDIR.value,
        policy_from=POLICY_FROM.value,
        reward_from=REWARD_FROM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    print(f"{'n':>10}{'best of n':>12}{'any of n':>12}")
    for n, share in summary["best_of_n"].items():
        print(f"{n:>10}{share:12.3f}{summary['any_right'][n]:12.3f}")
    print(f"{'step beam':>10}{summary['step_beam']:12.3f}")
    tokens = summary["tokens"]
    print(
        f"tokens a prompt: {tokens['best_of_n']:.0f} for the last n, {tokens['step_beam']:.0f} for the beam"
    )


if __name__ == "__main__":
    launch.launch(main, search.Config)
