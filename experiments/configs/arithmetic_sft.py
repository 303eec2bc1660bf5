"""SFT on the embedded arithmetic: sums worked out step by step, by a demonstrator who slips.

Command: python -m experiments.sft --config=experiments/configs/arithmetic_sft.py --workdir=runs/arithmetic/sft
Time: 35 to 50 s on two cores shared with other work.
Expect: held-out loss 0.068 a token; the demonstrator is right in 34% of the sums, and so is the policy.
"""

from experiments.launch import to_config_dict
from rlhf_jax.data.arithmetic import ArithmeticConfig
from rlhf_jax.stages import sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

# Prompts are "123+456=" and BOS; the longest worked answer of three digits has 38 characters and EOS.
DATA = DataConfig(
    embedded="arithmetic",
    arithmetic=ArithmeticConfig(num_demonstrations=32768),
    prompt_length=12,
    response_length=40,
)


def get_config():
    return to_config_dict(
        sft.Config(
            data=DATA,
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, b2=0.99),
            schedule=Schedule(num_steps=600, eval_every=100, save_every=300),
        )
    )
