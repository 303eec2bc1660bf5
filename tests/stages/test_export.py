"""A hand-off, exported, answers in transformers and in the next stage as the run itself does."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.models import decoder, huggingface
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import reward_model
from rlhf_jax.types import DemonstrationBatch

ROOT = pathlib.Path(__file__).parents[2]
TOKENS = np.array([[1, 5, 9, 20, 33, 2], [1, 6, 7, 2, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)


def export(run, target, *flags):
    command = [sys.executable, "-m", "experiments.export", f"--run={run}", f"--to={target}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def loaded(run):
    handoff, location = checkpoints.load_handoff(pathlib.Path(run))
    return ModelConfig.from_dict(handoff.model), checkpoints.restore_params(location), handoff.facts


def test_an_exported_policy_answers_in_transformers_as_here(ladder, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    assert export(ladder.sft, tmp_path / "policy").returncode == 0
    config, params, _ = loaded(ladder.sft)
    ours = decoder.logits(config, params, TOKENS, MASK)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        found = theirs(
            torch.tensor(TOKENS, dtype=torch.long), attention_mask=torch.tensor(MASK, dtype=torch.long)
        ).logits.numpy()
    np.testing.assert_allclose(found[MASK], np.asarray(ours)[MASK], atol=1e-4)
    again, back = huggingface.from_pretrained(tmp_path / "policy")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.eos_token_id == theirs.config.eos_token_id


def test_an_exported_reward_model_scores_as_here_but_for_a_constant_that_is_kept(ladder, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    assert export(ladder.reward_model, tmp_path / "reward").returncode == 0
    config, params, facts = loaded(ladder.reward_model)
    batch = DemonstrationBatch(tokens=TOKENS, token_mask=MASK, response_mask=MASK)
    ours = np.asarray(reward_model.score(config, params, batch, offset=facts["reward_offset"]))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        found = theirs(
            torch.tensor(TOKENS, dtype=torch.long), attention_mask=torch.tensor(MASK, dtype=torch.long)
        ).logits.numpy()[:, 0]
    np.testing.assert_allclose(found + theirs.config.score_bias, ours, atol=1e-4)


def test_what_is_there_is_not_written_over_and_no_run_is_a_sentence(ladder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    done = export(ladder.sft, tmp_path / "full")
    assert done.returncode == 2 and "is there already; give a new or an empty directory" in done.stderr
    done = export(tmp_path, tmp_path / "new")
    assert done.returncode == 2 and "is not the directory of a run" in done.stderr
    assert "Traceback" not in done.stderr
