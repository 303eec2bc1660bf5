"""The lab's own part: what it has trained from what, and what it makes of scores. Stages have tests of their own."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments import overoptimization_lab as lab
from experiments.configs import overoptimization as config
from rlhf_jax.errors import InputError
from rlhf_jax.stages import reward_model, sft


@pytest.fixture
def settings():
    return config.get_config().to_dict() | {"seed": 2}


def test_proxies_start_where_they_say(settings, monkeypatch):
    """One trunk for all but the small proxy, which has its own, and the ensemble whose members have one each."""
    runs, proxies = [], {}
    monkeypatch.setattr(sft, "run", lambda config, workdir: runs.append((str(workdir), config)))
    monkeypatch.setattr(
        reward_model,
        "run",
        lambda config, workdir, init_from: proxies.update({workdir.name: (config, init_from)}),
    )
    found = lab.train_proxies(settings, pathlib.Path("lab"), pathlib.Path("quick"), {})
    trunks = {name: one for name, one in runs}
    assert list(trunks) == ["lab/sft_narrow", "lab/sft_1", "lab/sft_2", "lab/sft_3"]
    assert [one.seed for one in trunks.values()] == [2, 1002, 2002, 3002]
    narrow, *others = (dataclasses.replace(one, seed=0) for one in trunks.values())
    assert others == [others[0]] * 3 and narrow.model.width < others[0].model.width
    assert {name: path.name for name, path in found.items()} == {name: f"reward_{name}" for name in found}
    assert set(found) == set(lab.DRAWN["proxies"])
    four = "quick/sft,lab/sft_1,lab/sft_2,lab/sft_3"
    starts = {name: origin for name, (_, origin) in proxies.items()}
    assert starts == dict.fromkeys(proxies, "quick/sft") | {
        "reward_narrow_8k": "lab/sft_narrow",
        "reward_trunks_8k": four,
    }
    one, many = proxies["reward_ensemble_8k"][0], proxies["reward_trunks_8k"][0]
    assert one == many and one.members == 4 and one.data.world.num_preferences == 8192
    assert proxies["reward_pairs_1k"][0].data.world.num_preferences == 1024


def test_best_of_n_by_every_proxy_is_drawn_from_the_same_scores():
    """Members that are one model are that model, in each of the three ways to join them."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(16, 32)).astype(np.float32)
    scores = {name: gold + rng.normal(size=gold.shape).astype(np.float32) for name in ("labeller", lab.FULL)}
    scores |= {name: gold.copy() for name in ("pairs_8k", "pairs_1k", "narrow_8k")}
    scores |= {"gold": gold, "ensemble_8k": np.stack([gold] * 4), "trunks_8k": np.stack([-gold] * 4)}
    sections = {section.key: section.courses for section in lab.sections_of_best_of_n(scores, penalty=0.5)}
    assert list(sections) == [f"best_of_n_{name}" for name in ("data", "size", "ensemble", "trunks")]
    one, *joined = sections["best_of_n_ensemble"].values()
    for course in joined:
        np.testing.assert_allclose(course.gold, one.gold, atol=1e-5)
    again, *apart = sections["best_of_n_trunks"].values()
    np.testing.assert_array_equal(again.gold, one.gold)
    for course in apart:
        # The best by the negative of gold is the worst.
        assert (course.gold < 0).all() and (one.gold > 0).all()


def test_every_run_that_is_drawn_is_in_the_config(settings):
    for part, names in lab.DRAWN.items():
        assert set(names) <= set(settings[part])
    assert {made["proxy"] for made in settings["policies"].values()} <= set(settings["proxies"])


@pytest.mark.parametrize(("proxy", "trunks"), [("narrow_8k", 4), ("trunks_8k", 3), ("pairs_8k", 2)])
def test_trunks_that_a_proxy_cannot_have_are_refused_before_training(settings, proxy, trunks):
    settings["proxies"][proxy]["trunks"] = trunks
    with pytest.raises(
        InputError, match=f"config.proxies.{proxy}.trunks is {trunks}, with [14] members and narrow"
    ):
        lab.train_proxies(settings, pathlib.Path("lab"), pathlib.Path("quick"), {})
