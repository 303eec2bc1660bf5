"""Rankings, soft labels and the length penalty in the reward-model stage: gradients by hand, splits, runs, refusals."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints, losses
from rlhf_jax.data import batches, prepared, world
from rlhf_jax.data.rows import Preference
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import heads
from rlhf_jax.rewards import ensembles
from rlhf_jax.rewards import reward_model as scorer
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import inputs, reward_measures, reward_model, reward_objectives
from rlhf_jax.stages.adapters import LoraOptions
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.types import PreferenceBatch, RankingBatch

from .conftest import DATA, REWARD, StopAfter

STOP = StopRequest()
RANKED = dataclasses.replace(
    REWARD, kind="all_pairs", batch_size=8, data=dataclasses.replace(DATA, ranking_size=3)
)


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(workdir))


@pytest.fixture(scope="module")
def model(ladder):
    return load_handoff_model(ladder.reward_model)


@pytest.fixture(scope="module")
def ranked(model) -> RankingBatch:
    """Eight rankings of two to four of the world's replies, one of them with a tie."""
    rows = world.rankings(world.WorldConfig(num_preferences=8), size=4)
    encoded, _ = batches.encode_rankings(rows, world.world_tokenizer(), ranking_size=4, **DATA.widths)
    [(batch, _)] = batches.eval_batches(encoded, 8)
    counts = np.array([2, 3, 4, 2, 4, 3, 4, 2])
    ranks = batch.ranks.copy()
    ranks[2] = [0, 2, 1, 1]
    return dataclasses.replace(batch, ranks=ranks, mask=np.arange(4) < counts[:, None])


def far(one, other):
    """The largest difference of two trees, beside the size of the second."""
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    return max(
        float(jnp.abs(a - b).max()) / size
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def value_and_grad(objective, params, batch):
    """Of the loss that the train step would make of the terms."""

    def value(params):
        return sum(term.mean() for term in objective(params, {}, batch)[0].values())

    return jax.jit(jax.value_and_grad(value))(params)


def test_all_pairs_has_the_value_and_gradient_of_its_pairs_by_hand(model, ranked):
    """Each prompt's pairs, scored one pair after the other by the objective of pairs, averaged per prompt."""
    pairs, weights = [], []
    for n in range(8):
        own = [
            (i, j)
            for i in range(4)
            for j in range(4)
            if ranked.mask[n, i] and ranked.mask[n, j] and ranked.ranks[n, i] < ranked.ranks[n, j]
        ]
        pairs += [(n, i, j) for i, j in own]
        weights += [1 / len(own) / 8] * len(own)
    assert len(pairs) == 1 + 3 + 5 + 1 + 6 + 3 + 6 + 1
    prompt, better, worse = np.array(pairs).T
    take = lambda which: jax.tree.map(lambda x: x[prompt, which], ranked.responses)  # noqa: E731

    def by_hand(params):
        margins = scorer.score(model.config, params, take(better)) - scorer.score(
            model.config, params, take(worse)
        )
        return jnp.sum(jnp.array(weights, jnp.float32) * jnp.logaddexp(0.0, -margins))

    expected, slope = jax.jit(jax.value_and_grad(by_hand))(model.params)
    objective = reward_objectives.make_objective(model.config, kind="all_pairs")
    value, gradient = value_and_grad(objective, model.params, ranked)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert far(gradient, slope) < 1e-4
    _, metrics = jax.jit(objective)(model.params, {}, ranked)
    margins = scorer.score(model.config, model.params, take(better)) - scorer.score(
        model.config, model.params, take(worse)
    )
    assert metrics["accuracy"].weight == len(pairs)
    np.testing.assert_allclose(metrics["accuracy"].mean(), np.mean(np.asarray(margins) > 0), rtol=1e-6)
    held = np.asarray(ranked.responses.token_mask & ranked.mask[..., None]).sum()
    assert float(metrics["tokens"].value) == held


def test_rankings_of_two_are_pairs_whatever_the_objective(model, ranked):
    """Of the world's own rankings, and of the same replies as pairs."""
    first = lambda x: x[:, :2]  # noqa: E731
    order = np.argsort(np.asarray(ranked.ranks[:, :2]), axis=1, kind="stable")
    side = lambda which: jax.tree.map(lambda x: x[np.arange(8), order[:, which]], ranked.responses)  # noqa: E731
    distinct = np.where(np.arange(2) == order[:, :1], 0, 1).astype(np.int32)
    of_two = RankingBatch(
        responses=jax.tree.map(first, ranked.responses), ranks=distinct, mask=np.ones((8, 2), bool)
    )
    pairs = PreferenceBatch(chosen=side(0), rejected=side(1))
    expected = value_and_grad(reward_objectives.make_objective(model.config), model.params, pairs)
    for kind in ("all_pairs", "plackett_luce"):
        objective = reward_objectives.make_objective(model.config, kind=kind)
        value, gradient = value_and_grad(objective, model.params, of_two)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert far(gradient, expected[1]) < 1e-4


def test_soft_labels_of_a_ranking_are_the_cross_entropy_to_them(model, ranked):
    """Against the pure loss on rewards scored one response after the other; certain ones are hard ones."""
    rng = np.random.default_rng(0)
    likely = rng.random((8, 4, 4)).astype(np.float32)
    likely = likely / (likely + likely.swapaxes(1, 2))
    objective = reward_objectives.make_objective(model.config, kind="all_pairs")
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ranked.responses)
    rewards = jnp.concatenate(
        [
            jax.jit(lambda rows: scorer.score(model.config, model.params, rows))(
                jax.tree.map(lambda x, i=i: x[i : i + 8], flat)
            )
            for i in range(0, 32, 8)
        ]
    )
    expected = losses.pairwise_ranking_loss(rewards.reshape(8, 4), ranked.ranks, ranked.mask, likely).mean()
    value, _ = value_and_grad(objective, model.params, dataclasses.replace(ranked, probability=likely))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    certain = dataclasses.replace(ranked, probability=np.ones((8, 4, 4), np.float32))
    np.testing.assert_allclose(
        value_and_grad(objective, model.params, certain)[0],
        value_and_grad(objective, model.params, ranked)[0],
        rtol=1e-6,
    )


@pytest.mark.parametrize("members", [1, 2])
def test_the_length_penalty_of_parts_is_that_of_the_batch(members, model, ranked):
    """Value and gradient, against the squared correlation of the whole batch differentiated as it stands.

    Of an ensemble against that of each member on its own prompts.
    """
    how = {"kind": "all_pairs", "length_penalty": 3.0}
    if members == 1:
        params = model.params
        objective = reward_objectives.make_objective(model.config, **how)
    else:
        others = [
            {
                "decoder": model.params["decoder"],
                "head": heads.init_scalar_head(model.config, jax.random.key(i)),
            }
            for i in range(members)
        ]
        params = ensembles.stack_members(others)
        objective = reward_objectives.make_ensemble_objective(model.config, members, **how)
    plain = reward_objectives.make_objective(model.config, kind="all_pairs")

    def of_one(params, batch):
        rewards, lengths, mask = reward_objectives.rewards_and_lengths(model.config, params, batch)
        variance, shared, spread = losses.length_moments(rewards, lengths, mask).sum(axis=0)
        return plain(params, {}, batch)[0]["all_pairs"].mean() + 3.0 * shared**2 / (variance * spread)

    def directly(params):
        if members == 1:
            return of_one(params, ranked)
        own = [jax.tree.map(lambda x, i=i: x[i::members], ranked) for i in range(members)]
        return sum(of_one(ensembles.member(params, i), own[i]) for i in range(members)) / members

    expected, slope = jax.jit(jax.value_and_grad(directly))(params)
    attached = jax.jit(reward_objectives.make_length_moments(model.config, members))(params, {}, ranked)

    def in_parts(params):
        parts = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], attached) for i in range(2)]
        terms = [objective(params, {}, part)[0] for part in parts]
        return sum((terms[0][name] + terms[1][name]).mean() for name in terms[0])

    value, gradient = jax.jit(jax.value_and_grad(in_parts))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert float(value) > float(value_and_grad(plain, model.params, ranked)[0]) or members > 1
    assert far(gradient, slope) < 1e-3


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> pathlib.Path:
    """A file of rankings of two to four replies by three annotators, and beside it the set prepared from it."""
    path = tmp_path_factory.mktemp("votes") / "ranked.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for number, row in enumerate(world.rankings(world.WorldConfig(num_preferences=40), size=4)):
        size = 2 + number % 3
        ranks = [list(range(1, size + 1))] * 2 + [(rng.permutation(size) + 1).tolist()]
        lines.append({"prompt": row.prompt, "responses": list(row.responses[:size]), "ranks": ranks})
    path.write_text("\n".join(map(json.dumps, lines)))
    prepared.prepare(path, "rankings", path.with_suffix(""))
    prepared.prepare(path, "preferences", path.with_name("pairs"))
    return path


@pytest.mark.parametrize("kind", ["all_pairs", pytest.param("pairs", marks=pytest.mark.slow)])
def test_a_prepared_set_trains_as_its_file_soft_labels_and_all(kind, votes, ladder, tmp_path):
    """Through the config that a command makes: kind, ranking_size, soft_labels and vote_prior are all read."""
    kept = votes.with_suffix("") if kind == "all_pairs" else votes.with_name("pairs")
    found = {}
    for name, path, soft in (("file", votes, True), ("set", kept, True), ("hard", votes, False)):
        given = {
            "kind": kind,
            "batch_size": 8,
            "schedule": {"num_steps": 2},
            "data": {"path": str(path), "soft_labels": soft, "vote_prior": 1.0, "ranking_size": 4},
        }
        config = configs.from_dict(reward_model.Config, given)
        reward_model.run(config, tmp_path / name, init_from=ladder.sft, stop=STOP)
        found[name] = rows_of(tmp_path / name)
    assert found["file"] == found["set"]
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "file"), params_of(tmp_path / "set"))
    term = "loss/all_pairs" if kind == "all_pairs" else "loss/bradley_terry"
    losses_of = {name: rows[-1][term] for name, rows in found.items()}
    # At two to one a soft label with a prior is (2 + 1) / (3 + 2), and three to nothing 4 / 5.
    assert abs(losses_of["file"] - losses_of["hard"]) > 1e-4
    facts = checkpoints.load_handoff(tmp_path / "file")[0].facts
    assert 0 <= facts["eval/accuracy"] <= 1 and "longer_wins" in facts
    assert -1 <= facts["eval/length_correlation"] <= 1 and "bayes_accuracy" not in facts


@pytest.mark.slow
def test_interrupted_equals_undisturbed_bitwise_with_a_length_penalty(ladder, tmp_path):
    config = dataclasses.replace(RANKED, length_penalty=2.0)
    start = {"init_from": ladder.sft}
    reward_model.run(config, tmp_path / "whole", stop=STOP, **start)
    with pytest.raises(Interrupted, match="saved step 1 of 4"):
        reward_model.run(config, tmp_path / "halves", stop=StopAfter(1), **start)
    reward_model.run(config, tmp_path / "halves", stop=STOP, **start)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "halves"), params_of(tmp_path / "whole"))
    assert rows_of(tmp_path / "halves") == rows_of(tmp_path / "whole")
    assert 0 <= rows_of(tmp_path / "whole")[-1]["loss/length"] <= 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"members": 2}, {"lora": LoraOptions(rank=2)}, {"kind": "plackett_luce"}],
    ids=["ensemble", "lora", "plackett_luce"],
)
def test_pmap_and_micro_batches_give_the_update_of_jit(options, ladder, tmp_path):
    found = {}
    for parallelism, parts in (("jit", 1), ("pmap", 1), ("jit", 2)):
        config = dataclasses.replace(
            RANKED,
            batch_size=16,
            length_penalty=1.0,
            num_microbatches=parts,
            schedule=Schedule(num_steps=2),
            optimizer=dataclasses.replace(RANKED.optimizer, learning_rate=1e-3),
            **options,
        )
        path = tmp_path / f"{parallelism}{parts}"
        reward_model.run(config, path, init_from=ladder.sft, parallelism=parallelism, stop=STOP)
        found[parallelism, parts] = params_of(path)
    for other in (("pmap", 1), ("jit", 2)):
        # The head's bias cancels in every pair: its gradient is rounding and nothing else.
        one, two = (
            {"decoder": params["decoder"], "kernel": params["head"]["kernel"]}
            for params in (found["jit", 1], found[other])
        )
        apart = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / (1e-2 + np.linalg.norm(a))), one, two)
        assert max(jax.tree.leaves(apart)) < 2e-5, apart


@pytest.mark.slow
def test_a_penalty_takes_length_out_of_what_a_labeller_who_likes_it_teaches(ladder, tmp_path):
    biased = dataclasses.replace(
        DATA.world, length_bias=1.0, noise=0.0, num_preferences=512, num_eval_preferences=64
    )
    correlation = {}
    for penalty in (0.0, 10.0):
        config = dataclasses.replace(
            REWARD,
            data=dataclasses.replace(DATA, world=biased),
            schedule=Schedule(num_steps=60),
            batch_size=32,
            length_penalty=penalty,
        )
        reward_model.run(config, tmp_path / str(penalty), init_from=ladder.sft, stop=STOP)
        facts = checkpoints.load_handoff(tmp_path / str(penalty))[0].facts
        correlation[penalty] = facts["eval/length_correlation"]
        assert 0.3 < facts["gold_accuracy"] < 1
    assert correlation[0.0] > 0.7 and abs(correlation[10.0]) < correlation[0.0] / 2


def test_the_length_correlation_is_that_of_the_two_sides_of_a_pair():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.standard_normal((2, 50))
    lengths = rng.integers(3, 20, (2, 50))
    scores = reward_measures.PairScores(
        chosen=chosen, rejected=rejected, extra_tokens=lengths[0] - lengths[1]
    )
    # A pair less its mean, both ways: NumPy's correlation of 100 numbers with mean 0.
    margins, extra = (np.concatenate([x, -x]) for x in (chosen - rejected, lengths[0] - lengths[1]))
    found = reward_measures.length_correlation(scores)
    np.testing.assert_allclose(found, np.corrcoef(margins, extra)[0, 1], rtol=1e-9)
    moments = losses.length_moments(
        np.stack([chosen, rejected], 1), np.stack(lengths, 1).astype(np.float64), np.ones((50, 2), bool)
    )
    variance, shared, spread = np.asarray(moments).sum(axis=0)
    np.testing.assert_allclose(found, shared / np.sqrt(variance * spread), rtol=1e-5)
    same = dataclasses.replace(scores, extra_tokens=np.zeros(50, int))
    assert reward_measures.length_correlation(same) == 0.0


def test_agreement_with_gold_by_hand():
    """Right, wrong, a tie that counts half, and a pair of equal gold that counts nothing."""
    golds = [(1.0, 0.0), (0.0, 2.0), (3.0, 1.0), (1.0, 1.0)]
    rows = [
        Preference(prompt="p", chosen="a", rejected="b", source="s", chosen_gold=a, rejected_gold=b)
        for a, b in golds
    ]
    assert reward_measures.gold_accuracy(rows, np.array([0.3, 0.1, 0.0, 5.0])) == (1 + 0 + 0.5) / 3


def test_what_rankings_cannot_do_is_refused(votes, ladder, tmp_path):
    with pytest.raises(InputError, match="config.margin is 0.5, which is of pairs; give 0, or kind=pairs"):
        dataclasses.replace(RANKED, margin=0.5)
    soft = dataclasses.replace(RANKED.data, soft_labels=True)
    with pytest.raises(InputError, match="kind=plackett_luce learns one order of the responses"):
        dataclasses.replace(RANKED, kind="plackett_luce", data=soft)
    with pytest.raises(
        InputError, match="a ranking of the embedded reviews is by one labeller, without votes"
    ):
        inputs.load_rankings(soft)
    with pytest.raises(InputError, match="embedded=arithmetic has no rankings"):
        inputs.load_rankings(DataConfig(embedded="arithmetic"))
    with pytest.raises(InputError, match="length_penalty is -1.0; it must be at least 0"):
        dataclasses.replace(REWARD, length_penalty=-1.0)
    with pytest.raises(InputError, match="ranking_size is 1; it must be at least 2"):
        DataConfig(ranking_size=1)
    pairs = votes.with_name("pairs")
    with pytest.raises(
        InputError, match="pairs holds preferences where rankings are needed; prepare .*--kind=rankings"
    ):
        inputs.load_rankings(DataConfig(path=str(pairs)))
    small = dataclasses.replace(
        RANKED, data=dataclasses.replace(RANKED.data, path=str(votes), ranking_size=2)
    )
    with pytest.raises(
        InputError, match="responses where ranking_size is 2: raise --config.data.ranking_size"
    ):
        reward_model.run(small, tmp_path, init_from=ladder.sft, stop=STOP)
