"""Supervised fine-tuning.

    python -m experiments.sft --workdir=runs/sft                                         # the embedded world
    python -m experiments.sft --workdir=runs/sft --config.model.path=<Hugging Face directory> \\
        --config.data.path=pairs.jsonl.gz --config.data.prompt_length=128 --config.data.response_length=128

On a file of preferences (prompt/chosen/rejected, or transcript pairs) it learns the chosen responses; with
--config.data.format=demonstrations the file holds prompt/response rows.
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import sft

CONFIG = launch.define_config("sft")
WORKDIR = launch.define_workdir()
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(sft.Config, CONFIG.value.to_dict())
    sft.run(
        config, WORKDIR.value, parallelism=PARALLELISM.value, mesh=meshes.make_mesh(MESH.value), stop=stop
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, sft.Config)
