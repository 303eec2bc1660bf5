"""Means and ranges over labs, and what a lab lacks."""

import json

import pytest

from experiments import overoptimization_seeds as seeds


def course(peak, seen, golds):
    fit = None if peak is None else {"peak_distance": peak, "peak_seen": seen}
    return {"fit": fit, "greatest_gold": 2.0, "greatest_gold_kl": 4.0, "gold_at_kl": golds}


def test_a_cell_is_mean_least_and_greatest_of_what_is_there(tmp_path, capsys):
    """Peaks of 2 and 4 nats; the third lab's curve does not turn within its data. Gold at 4 nats: in one lab only."""
    found = [
        course(2**0.5, True, {"1": 1.0, "4": None}),
        course(2.0, True, {"1": 2.0, "4": 0.5}),
        course(9.0, False, {"1": 6.0, "4": None}),
    ]
    names = []
    for number, one in enumerate(found):
        (tmp_path / str(number)).mkdir()
        names.append(str(tmp_path / str(number)))
        lab = {"courses": {"ppo_data": {"pairs_8k": one}}}
        (tmp_path / str(number) / seeds.SUMMARY).write_text(json.dumps(lab))
    seeds.main(["", *names])
    row = capsys.readouterr().out.splitlines()[-1]
    peak, at_1, at_4 = "3.00 (2.00 to 4.00), 2 of 3", "3.00 (1.00 to 6.00)", "0.50 (0.50 to 0.50), 1 of 3"
    assert row == f"| pairs_8k | {peak} | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | {at_1} | {at_4} |"


def test_a_leashed_run_has_no_peak():
    assert seeds.over([seeds.peak_kl(course(None, True, {}))]) == "-"


def test_a_directory_without_a_lab_is_named(tmp_path):
    with pytest.raises(SystemExit, match="has no overoptimization.json; run experiments.overoptimization"):
        seeds.main(["", str(tmp_path)])
