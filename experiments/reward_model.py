"""A Bradley-Terry reward model from pairwise preferences, or from rankings.

python -m experiments.reward_model --workdir=runs/reward_model --init_from=runs/sft

--config.kind=all_pairs or plackett_luce learns whole rankings (--config.data.path: of a file, or a set prepared with
--kind=rankings), --config.data.soft_labels how sure annotators are, --config.length_penalty holds back a taste for
length. --config.members=4 trains an ensemble, each member from a trunk of its own where --init_from names as many;
--config.objectives="('preferred','brief')" a head for each of the labels that pairs have. docs/rewards.md says what
each is worth.
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import reward_model

CONFIG = launch.define_config("reward_model")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT, or a Hugging Face directory: the trunk to start from. With commas between them, one for "
    "each member of an ensemble."
)
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(reward_model.Config, CONFIG.value.to_dict())
    reward_model.run(
        config,
        WORKDIR.value,
        init_from=INIT_FROM.value,
        parallelism=PARALLELISM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, reward_model.Config)
