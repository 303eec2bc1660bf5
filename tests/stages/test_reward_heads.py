"""Several objectives on one trunk: what each head learns from, how it is judged, and how later stages name it."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches, prepared, rows
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model as scoring
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import evaluate, grpo, inputs, ppo, reward_forms, reward_model, rewards, several_rewards
from rlhf_jax.stages.adapters import LoraOptions
from rlhf_jax.stages.handoffs import check_scores, load_beside, load_handoff_model, load_model
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.reward_measures import PairScores
from rlhf_jax.stages.run_directory import Run, changed_inputs, identity, split_objective
from rlhf_jax.stages.several_rewards import Constraint
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import init_train_state, make_train_step

from .conftest import DATA, PPO, REWARD, SHARED, StopAfter

STOP = StopRequest()
BOTH = dataclasses.replace(REWARD, objectives=("preferred", "brief"))
NAMES = BOTH.objectives


@pytest.fixture(scope="module")
def model(ladder):
    return load_handoff_model(ladder.sft, meshes.data_mesh())


@pytest.fixture(scope="module")
def both(ladder, tmp_path_factory) -> str:
    workdir = tmp_path_factory.mktemp("both")
    reward_model.run(BOTH, workdir, init_from=ladder.sft, stop=STOP)
    return str(workdir)


def encoded_pairs(model, pairs):
    return batches.encode_preferences(pairs, model.tokenizer, **DATA.widths)[0]


def batch_of(model, pairs):
    """All of them as one batch."""
    (batch, real), *others = batches.eval_batches(encoded_pairs(model, pairs), len(pairs))
    assert real.all() and not others
    return jax.tree.map(jnp.asarray, batch)


def judged(count, **labels):
    """So many pairs of the world, each with a label of every name; a list says one a pair."""
    of_each = [
        tuple((name, label[place]) for name, label in labels.items() if label[place] is not None)
        for place in range(count)
    ]
    pairs = inputs.load_preferences(DATA).train[:count]
    return [
        dataclasses.replace(pair, labels=own, objectives=tuple(labels))
        for pair, own in zip(pairs, of_each, strict=True)
    ]


def fresh(model, number):
    return {
        "decoder": model.params["decoder"],
        "head": scoring.init_heads(model.config, jax.random.key(3), number=number),
    }


def loss_of(terms):
    return sum(term.mean() for term in terms.values())


def test_each_head_has_the_loss_of_its_own_labels(model):
    """Against Bradley-Terry in float64 on the rewards of one head, over the pairs that its objective judges."""
    a, b = [1.0, 0.0, None, 0.75, 0.5, 1.0], [None, 1.0, 0.0, None, 0.25, 0.0]
    pairs, params = judged(6, a=a, b=b), fresh(model, 2)
    batch = batch_of(model, pairs)
    how = {"margin": 0.3, "label_smoothing": 0.1, "centering": 0.01}
    objective = reward_forms.of_objectives(model.config, ("a", "b"), how).objective
    terms, metrics = objective(params, {}, batch)
    for place, (name, labels) in enumerate({"a": a, "b": b}.items()):
        one = {"decoder": params["decoder"], "head": jax.tree.map(lambda x, k=place: x[k], params["head"])}
        sides = [scoring.score(model.config, one, side) for side in (batch.chosen, batch.rejected)]
        chosen, rejected = (np.asarray(side, np.float64) for side in sides)
        values, right, decided = [], [], 0
        for label, first, second in zip(labels, chosen, rejected, strict=True):
            if label is None:
                continue
            value = 0.01 * (first + second) ** 2
            for share, difference in ((label, first - second), (1 - label, second - first)):
                d = difference - 0.3
                value += share * (0.9 * np.log1p(np.exp(-d)) + 0.1 * np.log1p(np.exp(d)))
            values.append(value)
            decided += label != 0.5
            right.append(label != 0.5 and (first > second) == (label > 0.5))
        assert terms[name].mean() == pytest.approx(np.mean(values), rel=1e-5)
        assert metrics[f"accuracy_{name}"].mean() == pytest.approx(sum(right) / decided)
        sides = [np.sign(label - 0.5) if label is not None else 0.0 for label in labels]
        margin = float(np.sum(sides * (chosen - rejected)) / decided)
        assert float(metrics[f"margin_{name}"].mean()) == pytest.approx(margin, rel=1e-5, abs=1e-7)


def test_a_head_without_labels_gives_nothing_and_gets_nothing(model):
    """What nobody judges by an objective moves neither that head nor, by it, the trunk."""
    pairs, params = judged(4, a=[1.0, 0.0, 1.0, 1.0], b=[None] * 4), fresh(model, 2)
    batch = batch_of(model, pairs)
    both = reward_forms.of_objectives(model.config, ("a", "b"), {}).objective
    gradient = jax.grad(lambda params: loss_of(both(params, {}, batch)[0]))(params)
    assert not np.any(gradient["head"]["kernel"][1]) and np.any(gradient["head"]["kernel"][0])
    one = reward_forms.of_objectives(model.config, ("a",), {}).objective
    alone = {"decoder": params["decoder"], "head": jax.tree.map(lambda x: x[:1], params["head"])}
    first = dataclasses.replace(batch, probability=batch.probability[:, :1], judged=batch.judged[:, :1])
    expected = jax.grad(lambda params: loss_of(one(params, {}, first)[0]))(alone)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradient["decoder"], expected["decoder"]
    )


def test_one_objective_is_the_reward_model_itself(model):
    """A head for the label that ``chosen`` has: the same loss, accuracy and gradient as without objectives."""
    pairs = [dataclasses.replace(pair, objectives=("preferred",)) for pair in judged(8, preferred=[1.0] * 8)]
    params, batch = fresh(model, 1), batch_of(model, pairs)
    single = {**params, "head": jax.tree.map(lambda x: x[0], params["head"])}
    plain = dataclasses.replace(batch, probability=None, judged=None)
    of_heads = reward_forms.of_objectives(model.config, ("preferred",), {}).objective
    of_one = reward_forms.one(model.config, {}).objective
    heads, one = (
        jax.value_and_grad(lambda p, f=f, b=b: loss_of(f(p, {}, b)[0]))(p)
        for f, p, b in ((of_heads, params, batch), (of_one, single, plain))
    )
    assert heads[0] == pytest.approx(float(one[0]), rel=1e-6)
    np.testing.assert_allclose(heads[1]["head"]["kernel"][0], one[1]["head"]["kernel"], atol=1e-6)
    accuracy = of_heads(params, {}, batch)[1]["accuracy_preferred"].mean()
    assert accuracy == of_one(single, {}, plain)[1]["accuracy"].mean()


def test_micro_batches_make_the_same_update_however_labels_lie(model):
    """One half has all the labels of one objective: totals and weights are divided once."""
    pairs = judged(8, a=[1.0] * 4 + [None] * 4, b=[0.0, None] * 4)
    config, batch = dataclasses.replace(BOTH, objectives=("a", "b")), batch_of(model, pairs)
    optimizer = make_optimizer(config.optimizer, 4)
    objective = config.form(model.config).objective
    found = []
    for parts in (1, 2, 4):
        state = init_train_state(fresh(model, 2), optimizer, jax.random.key(0))
        step = jax.jit(make_train_step(objective, optimizer, num_microbatches=parts))
        found.append(step(state, {}, batch))
    for state, metrics in found[1:]:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.params, found[0][0].params
        )
        for name in ("loss/a", "loss/b", "accuracy_a"):
            assert metrics[name].mean() == pytest.approx(float(found[0][1][name].mean()), rel=1e-5)


def test_a_head_is_judged_from_the_side_of_its_own_labels():
    """By hand: of four pairs the second objective turns one round, is undecided on one, and knows nothing of one."""
    pair = rows.Preference(
        prompt="p", chosen="longer", rejected="short", source="s", chosen_gold=1.0, rejected_gold=2.0
    )
    labels = [(("a", 1.0), ("b", 0.25)), (("a", 1.0), ("b", 0.5)), (("a", 1.0),), (("a", 0.0), ("b", 1.0))]
    pairs = [dataclasses.replace(pair, labels=own) for own in labels]
    chosen = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    scores = PairScores(chosen=chosen, rejected=chosen - 10.0, extra_tokens=np.array([1, 2, 3, 4]))
    views = reward_forms.of_objectives(None, ("a", "b"), {}).views(scores, pairs)
    (first, of_a, rows_a), (second, of_b, rows_b) = views
    assert (first, second) == ("a", "b")
    np.testing.assert_array_equal(of_a.chosen, [1.0, 2.0, 3.0, -6.0])
    np.testing.assert_array_equal(of_a.extra_tokens, [1, 2, 3, -4])
    np.testing.assert_array_equal(of_b.chosen, [-5.0, 8.0])
    np.testing.assert_array_equal(of_b.rejected, [5.0, -2.0])
    assert [row.chosen for row in rows_a] == ["longer"] * 3 + ["short"]
    assert [(row.chosen, row.chosen_gold) for row in rows_b] == [("short", 2.0), ("longer", 1.0)]
    zero = reward_forms.of_objectives(None, ("a", "b"), {}).zero(scores, pairs)
    assert zero == {"objectives": ["a", "b"], "reward_offsets": [0.0, 1.5]}


def facts_of(workdir):
    return checkpoints.load_handoff(workdir)[0].facts


def test_a_run_says_of_each_head_how_good_it_is(both):
    facts = facts_of(both)
    assert facts["objectives"] == list(NAMES)
    for name in ("eval/accuracy", "eval/loss", "longer_wins", "gold_accuracy", "calibration_error"):
        assert facts[name] == facts[f"{name}_preferred"] != facts[f"{name}_brief"]
    # Of labellers who take 1 off for a word the shorter response wins nearly always.
    assert facts["longer_wins_brief"] < 0.3 < facts["longer_wins_preferred"]
    assert not [name for name in facts if name.startswith("bayes_accuracy")], "that is of the rows' own label"
    first, *_, last = read_metrics(pathlib.Path(both) / "metrics.jsonl")
    assert {f"eval/accuracy_{name}" for name in NAMES} < set(first) and "accuracy_brief" in last
    assert len(json.loads((pathlib.Path(both) / "margins.json").read_text())["margins"]) == 20


def test_zero_is_what_each_objective_prefers(both, model):
    """Each head's scores less its offset are 0 on average over what its own labels prefer."""
    found = load_handoff_model(both)
    pairs = inputs.load_preferences(BOTH.data, NAMES).train
    batch = batch_of(model, pairs)
    offsets = jnp.array(found.facts["reward_offsets"])
    chosen, rejected = (
        scoring.score_by_objectives(found.config, found.params, side, offsets=offsets)
        for side in (batch.chosen, batch.rejected)
    )
    for place, name in enumerate(NAMES):
        wins = np.array([rows.label_of(pair, name) > 0.5 for pair in pairs])
        assert np.mean(np.where(wins, chosen[place], rejected[place])) == pytest.approx(0.0, abs=1e-5)


def test_one_head_is_a_reward_model_by_itself(both, ladder, model, tmp_path):
    run = Run(workdir=tmp_path, stage="grpo", mesh=meshes.data_mesh(), parallelism="jit", stop=STOP)
    batch = batch_of(model, inputs.load_preferences(DATA).held_out).chosen
    whole = load_handoff_model(both, meshes.data_mesh())
    for place, name in enumerate(NAMES):
        one = load_model(f"{both}:{name}", run)
        check_scores(one)
        of_head = scoring.score(one.config, one.params, batch, offset=one.facts["reward_offset"])
        expected = scoring.score_by_objectives(
            whole.config, whole.params, batch, offsets=jnp.array(whole.facts["reward_offsets"])
        )
        np.testing.assert_allclose(of_head, expected[place], atol=1e-5)
    with pytest.raises(
        InputError, match="there is no .*:wise: the model of .* has heads for preferred, brief"
    ):
        load_model(f"{both}:wise", run)
    with pytest.raises(InputError, match="there is no .*:brief: .* has no heads with names"):
        load_model(f"{ladder.reward_model}:brief", run)
    with pytest.raises(
        InputError, match=r"has a head for each of preferred, brief.* give .*:preferred or .*:brief"
    ):
        check_scores(whole)


def test_a_name_behind_a_colon_is_a_head_only_behind_a_run(both, tmp_path):
    (tmp_path / "a:b").mkdir()
    assert split_objective(f"{both}:brief") == (both, "brief")
    for path in (
        both,
        str(tmp_path / "a:b"),
        str(tmp_path / "c:d"),
        "gs://bucket/run",
        f"{both}:",
        "owner/name",
    ):
        assert split_objective(path) == (path, "")
    assert several_rewards.rewards_of(f"{both},{both}:brief") == [
        f"{both}:preferred",
        f"{both}:brief",
        f"{both}:brief",
    ]


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


def test_a_constraint_binds_the_second_head(both, ladder, tmp_path):
    """The run names its heads in their order; the multiplier follows the second, evaluations show each."""
    config = grpo.Config(
        **SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=2)},
        constraint=Constraint(at_least=3.0, rate=0.4, limit=0.7),
        num_eval_prompts=12,
        group_size=4,
    )
    heads = {
        "run": both,
        "heads": f"{both}:preferred,{both}:brief",
        "turned": f"{both}:brief,{both}:preferred",
    }
    found = {}
    for name, where in heads.items():
        grpo.run(config, tmp_path / name, init_from=ladder.sft, reward_from=where, stop=STOP)
        found[name] = rows_of(tmp_path / name)
        assert changed_inputs(tmp_path / name) == []
    assert found["run"] == found["heads"]
    start, turned = found["run"][0], found["turned"][0]
    assert start["eval/proxy_1"] == pytest.approx(turned["eval/proxy_2"], abs=1e-5)
    assert start["eval/proxy_2"] == pytest.approx(turned["eval/proxy_1"], abs=1e-5)
    assert abs(start["eval/proxy_1"] - start["eval/proxy_2"]) > 1e-3
    first = found["run"][1]
    multiplier = min(max(0.4 * (3.0 - first["proxy_2"]), 0.0), 0.7)
    assert 0 < found["run"][2]["multiplier"] == pytest.approx(multiplier, rel=1e-6)
    assert first["proxy"] == pytest.approx(first["proxy_1"], rel=1e-5)
    with pytest.raises(InputError, match="belongs to a run with another config .*inputs.reward_from"):
        grpo.run(config, tmp_path / "run", init_from=ladder.sft, reward_from=heads["turned"], stop=STOP)


def test_an_input_is_the_head_and_not_only_its_run(both):
    assert identity(f"{both}:brief")["handoff"] == identity(f"{both}:preferred")["handoff"]
    assert identity(f"{both}:brief")["path"] != identity(f"{both}:preferred")["path"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_ppo_on_one_head_starts_its_values_from_it(rank, both, ladder, tmp_path):
    """By name, with and without adapters on one base."""
    lora = LoraOptions(rank=rank)
    if rank:
        config, both = dataclasses.replace(BOTH, lora=lora), str(tmp_path / "both")
        reward_model.run(config, both, init_from=ladder.sft, stop=STOP)
    config = dataclasses.replace(PPO, lora=lora, schedule=Schedule(num_steps=1))
    ppo.run(config, tmp_path / "ppo", init_from=ladder.sft, reward_from=f"{both}:brief", stop=STOP)
    assert rows_of(tmp_path / "ppo")[0]["eval/kl"] == 0
    run = Run(workdir=tmp_path, stage="ppo", mesh=meshes.data_mesh(), parallelism="jit", stop=STOP)
    base = load_model(ladder.sft, run)
    source = load_beside(f"{both}:brief", run, base, lora)
    _, value = ppo._initial_value(config, rewards.model_reward(source, rewards.Scoring()), run, base)
    whole = checkpoints.restore_params(checkpoints.handoff_path(both))["head"]
    np.testing.assert_allclose(value["head"]["kernel"], whole["kernel"][1], rtol=1e-6)
    bias = whole["bias"][1] - facts_of(both)["reward_offsets"][1]
    assert float(value["head"]["bias"]) == pytest.approx(float(bias), abs=1e-6)
    with pytest.raises(InputError, match="scoring.weights has 0 numbers, and --reward_from names 2 rewards"):
        ppo.run(config, tmp_path / "other", init_from=ladder.sft, reward_from=both, stop=STOP)


@pytest.mark.slow
def test_an_evaluation_and_a_held_out_reward_take_one_head(both, ladder, tmp_path):
    config = evaluate.Config(data=DATA, num_prompts=12, batch_size=16, best_of=0, num_shown=1)
    how = {"reference_from": ladder.sft, "policies_from": {}, "stop": STOP}
    summaries = [
        evaluate.run(config, tmp_path / name, reward_from=f"{both}:{name}", **how)["sft"] for name in NAMES
    ]
    assert summaries[0]["gold"] == summaries[1]["gold"] and summaries[0]["proxy"] != summaries[1]["proxy"]
    with pytest.raises(InputError, match="has a head for each of preferred, brief"):
        evaluate.run(config, tmp_path / "none", reward_from=both, **how)
    online = grpo.Config(**SHARED | {"batch_size": 16}, num_eval_prompts=12)
    with pytest.raises(InputError, match=f"--held_out_reward_from={both} has a head for each of"):
        grpo.run(
            online,
            tmp_path / "grpo",
            init_from=ladder.sft,
            reward_from=ladder.reward_model,
            held_out_reward_from=both,
            stop=STOP,
        )


@pytest.mark.slow
def test_interrupted_twice_equals_undisturbed_bitwise(both, ladder, tmp_path):
    for _ in range(2):
        with pytest.raises(Interrupted):
            reward_model.run(BOTH, tmp_path, init_from=ladder.sft, stop=StopAfter(1))
    reward_model.run(BOTH, tmp_path, init_from=ladder.sft, stop=STOP)
    assert (tmp_path / "metrics.jsonl").read_text() == (pathlib.Path(both) / "metrics.jsonl").read_text()
    jax.tree.map(
        np.testing.assert_array_equal,
        *(checkpoints.restore_params(checkpoints.handoff_path(path)) for path in (tmp_path, both)),
    )
    assert facts_of(tmp_path) == facts_of(both)


def test_a_file_and_the_set_prepared_from_it_train_the_same(ladder, tmp_path):
    """Rows of either of two shapes, with a label missing here and there."""
    pairs = inputs.load_preferences(DATA).train[:40]
    records = []
    for number, pair in enumerate(pairs):
        if number % 2:
            labels = {"better": 1, "safer": (None, 0.25, 1)[number % 3]}
            records.append(
                {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "labels": labels}
            )
        else:
            records.append(
                {
                    "prompt": pair.prompt,
                    "response_0": pair.rejected,
                    "response_1": pair.chosen,
                    "is_response_0_safe": True,
                    "is_response_1_safe": number % 4 == 0,
                    "better_response_id": 1,
                    "safer_response_id": number % 4 // 2,
                }
            )
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepared.prepare(path, "preferences", tmp_path / "set")
    found = []
    for source in (path, tmp_path / "set"):
        given = {
            "data": {"path": str(source), "held_out_fraction": 0.25},
            "objectives": ["safer", "better"],
            "schedule": {"num_steps": 2},
            "batch_size": 8,
        }
        config = configs.from_dict(reward_model.Config, given)
        assert config.objectives == ("safer", "better")
        workdir = tmp_path / f"of_{source.name}"
        reward_model.run(config, workdir, init_from=ladder.sft, stop=STOP)
        found.append((workdir / "metrics.jsonl").read_text())
    assert found[0] == found[1] and "accuracy_safer" in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ("brief", "brief")}, "has a name twice"),
        ({"objectives": ("a:b",)}, "config.objectives has 'a:b', which no command line could name"),
        ({"objectives": ("",)}, "config.objectives has ''"),
        ({"members": 2}, "config.members is of reward models with one head"),
        ({"length_penalty": 1.0}, "config.length_penalty is of reward models with one head"),
        ({"kind": "all_pairs"}, "config.kind is of reward models"),
        (
            {"data": dataclasses.replace(DATA, soft_labels=True)},
            "config.data.soft_labels is of reward models",
        ),
        (
            {"optimizer": dataclasses.replace(BOTH.optimizer, weight_decay=0.1)},
            "config.optimizer.weight_decay is of",
        ),
    ],
)
def test_what_several_heads_do_not_have_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BOTH, **change)


def test_an_objective_that_nobody_judged_by_is_refused_before_training(ladder, tmp_path):
    config = dataclasses.replace(BOTH, objectives=("preferred", "kind"))
    with pytest.raises(
        InputError, match="no row held out says .* better by 'kind' .*by 'preferred', 'brief', none by that"
    ):
        reward_model.run(config, tmp_path / "a", init_from=ladder.sft, stop=STOP)
    records = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in inputs.load_preferences(DATA).train[:20]
    ]
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(path=str(path), held_out_fraction=0.3)
    with pytest.raises(InputError, match=r"better by 'brief' \(they have no labels by objectives\)"):
        reward_model.run(
            dataclasses.replace(BOTH, data=data, objectives=("brief",)),
            tmp_path / "b",
            init_from=ladder.sft,
            stop=STOP,
        )


def test_reference_rows_are_found_for_each_objective(model):
    """They go on past the rows of an objective that is satisfied, and stop once all are."""
    pairs = judged(6, a=[1.0] * 6, b=[None, 0.5, None, 0.0, 1.0, 1.0])
    encoded = encoded_pairs(model, pairs)
    kept = reward_forms.first_decided(("a", "b"), encoded.rows, 2, which="to train on", stop=STOP)
    assert [row.row.source for row in kept] == [pairs[place].source for place in (0, 1, 3, 4)]
    ties = encoded_pairs(model, judged(3, a=[0.5] * 3))
    with pytest.raises(InputError, match=r"better by 'a' \(they have labels by 'a', all of them ties\)"):
        reward_forms.first_decided(("a",), ties.rows, 1, which="held out", stop=STOP)
    with pytest.raises(Interrupted, match="nothing was trained yet"):
        reward_forms.first_decided(("a",), ties.rows, 1, which="held out", stop=StopAfter(0))


@pytest.mark.slow
def test_weighted_heads_are_a_sum_of_standard_scores(both, ladder, tmp_path):
    """Weights (1, -1) of one head twice are nothing; and a head alone is its standard score on the first policy."""
    config = grpo.Config(
        **SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=1)}, num_eval_prompts=12, group_size=4
    )
    found = {}
    for name, where, weights in (
        ("nothing", f"{both}:brief,{both}:brief", (1.0, -1.0)),
        ("first", both, (1.0, 0.0)),
        ("second", both, (0.0, 2.0)),
        ("both", both, (1.0, 2.0)),
    ):
        weighted = dataclasses.replace(config, scoring=rewards.Scoring(weights=weights))
        grpo.run(weighted, tmp_path / name, init_from=ladder.sft, reward_from=where, stop=STOP)
        found[name] = rows_of(tmp_path / name)
    assert found["nothing"][-1]["proxy"] == pytest.approx(0.0, abs=1e-5)
    start = {name: rows[0]["eval/proxy"] for name, rows in found.items()}
    assert start["both"] == pytest.approx(start["first"] + start["second"], abs=1e-5)
    # Other draws of the same policy to the same prompts: about 0 in the unit of their spread, whatever the head's.
    assert all(abs(start[name]) < 2.0 for name in ("first", "second"))
    raw = {f"proxy_{k}": found["both"][0][f"eval/proxy_{k}"] for k in (1, 2)}
    assert start["first"] != pytest.approx(raw["proxy_1"], abs=1e-3)
    assert start["second"] != pytest.approx(2.0 * raw["proxy_2"], abs=1e-3)
    members = dataclasses.replace(config, scoring=rewards.Scoring(weights=(1.0, 1.0), members="worst_case"))
    with pytest.raises(
        InputError, match=f"scoring.members is 'worst_case', and --reward_from={both} is no ensemble"
    ):
        grpo.run(members, tmp_path / "members", init_from=ladder.sft, reward_from=both, stop=STOP)


def test_one_evaluation_scores_a_rollout_once():
    """Both heads beside one another, and what is made of them: one pass through the trunk."""
    calls = []
    score = rewards._once(lambda rollout, rows: calls.append(rollout) or jnp.ones((2, 3)))
    first, second = object(), object()
    for rollout in (first, first, first, second, first):
        score(rollout, [])
    assert calls == [first, second, first]
