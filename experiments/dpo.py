"""Direct preference optimisation: the shortcut from SFT and pairs to an aligned policy.

    python -m experiments.dpo --workdir=runs/dpo --init_from=runs/sft
    python -m experiments.dpo --workdir=runs/ipo --init_from=runs/sft --config.loss.kind=ipo

--config.loss.kind is dpo, robust, ipo, hinge (SLiC), simpo, orpo or kto.
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import dpo

CONFIG = launch.define_config("dpo")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT, or a Hugging Face directory: the initial policy and the frozen reference."
)
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(dpo.Config, CONFIG.value.to_dict())
    dpo.run(
        config,
        WORKDIR.value,
        init_from=INIT_FROM.value,
        parallelism=PARALLELISM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, dpo.Config)
