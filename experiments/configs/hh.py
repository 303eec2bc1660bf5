"""SFT and a reward model on transcript pairs (HH-RLHF): a small pretrained model, long prompts cut to their end.

Command: python -m experiments.quickstart --workdir=runs/hh --config=experiments/configs/hh.py --stages=sft,reward_model
    --config.model.path=<Hugging Face directory> --config.data.path=<hh_harmless_base_test.jsonl.gz>
    --config.data.on_bad_row=skip

Sized for a model of 260 thousand parameters and 512 tokens (stories260K): 2 minutes on two shared cores. Expect with
it: held-out perplexity 22.6 -> 10.4; reward model 0.530 on 462 unseen pairs, where "the longer one wins" has 0.457 and
so "the shorter one wins" 0.543. 4 rows are unreadable; 1,813 pairs are cut. docs/real_input.md says more.
"""

from experiments.configs import arguments
from experiments.launch import to_config_dict
from rlhf_jax.stages.inputs import DataConfig


def get_config():
    config = arguments.get_config()
    config.data = to_config_dict(
        DataConfig(prompt_length=128, response_length=128, truncation="keep_end", held_out_fraction=0.2)
    )
    config.sft.schedule.num_steps = 40
    config.reward_model.schedule.num_steps = 40
    config.reward_model.schedule.eval_every = 0
    return config
