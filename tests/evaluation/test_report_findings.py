"""What is said of a ladder, against courses and accuracies worked by hand."""

import pytest

from rlhf_jax.evaluation.report_files import Point
from rlhf_jax.evaluation.report_findings import (
    describe_course,
    describe_reward_model,
    gold_course,
    gold_gain,
)


def course_of(*golds, proxies=None):
    proxies = proxies or range(len(golds))
    return gold_course(
        [
            Point(step=10 * n, kl=float(n), proxy=p, gold=g)
            for n, (g, p) in enumerate(zip(golds, proxies, strict=True))
        ]
    )


def test_a_fall_is_a_share_of_the_gain():
    course = course_of(1.0, 2.0, 5.0, 3.0)
    assert (course.start.step, course.peak.step, course.last.step) == (0, 20, 30)
    assert course.gained == 4.0 and course.lost == 0.5
    assert course_of(1.0, 2.0, 0.5).lost == 1.5
    assert course_of(-3.0, -1.0, -1.5).lost == 0.25


def test_the_first_of_equal_peaks_counts_and_the_end_may_be_the_peak():
    assert course_of(0.0, 2.0, 2.0, 1.0).peak.step == 10
    assert course_of(0.0, 1.0, 2.0).lost == 0.0
    assert course_of(2.0, 1.0, 0.0).lost is None and course_of(2.0, 2.0).lost is None


def test_no_course_without_gold_or_without_a_second_evaluation():
    assert (
        gold_course(
            [Point(step=0, kl=0.0, proxy=0.0, gold=None), Point(step=1, kl=1.0, proxy=1.0, gold=None)]
        )
        is None
    )
    assert course_of(1.0) is None and gold_course([]) is None


@pytest.mark.parametrize(
    ("golds", "proxies", "said"),
    [
        (
            (1.0, 5.0, 3.0),
            (0.0, 1.0, 2.0),
            "Gold rose from 1.00 to 5.00 (step 10, KL 1.0 nats), then fell to 3.00 at KL 2.0 nats: 50% of "
            "what had been gained was lost. Meanwhile the proxy rose from 1.00 to 2.00.",
        ),
        (
            (1.0, 5.0, 0.0),
            (0.0, 2.0, 1.0),
            "Gold rose from 1.00 to 5.00 (step 10, KL 1.0 nats), then fell to 0.00 at KL 2.0 nats: 125% "
            "of what had been gained was lost, and it ended worse than it had begun. "
            "Meanwhile the proxy fell from 2.00 to 1.00.",
        ),
        (
            (1.0, 5.0, 4.8),
            (0.0, 2.0, 2.001),
            "Gold rose from 1.00 to 5.00 (step 10, KL 1.0 nats) and stayed near it, ending at 4.80 (5% of "
            "what had been gained was lost); the proxy rose from 0.00 to 2.00.",
        ),
        (
            (1.0, 2.0),
            (0.5, 0.5),
            "Gold rose from 1.00 to 2.00 (step 10, KL 1.0 nats), its highest at the last evaluation; the "
            "proxy stayed at 0.50.",
        ),
        (
            (1.0, 0.5),
            (0.0, 3.0),
            "Gold never rose above the 1.00 it started from and ended at 0.50, while the proxy rose from 0.00 to 3.00.",
        ),
    ],
)
def test_a_course_in_words(golds, proxies, said):
    assert describe_course(course_of(*golds, proxies=proxies)) == said


def test_a_gain_is_counted_in_deviations_of_sft():
    policies = {
        "sft": {"gold": 1.0, "gold_std": 2.0},
        "ppo": {"gold": 4.0, "gold_std": 9.0},
        "real": {"proxy": 1.0},
    }
    assert gold_gain(policies, "ppo") == (3.0, 1.5)
    assert gold_gain(policies, "real") is None and gold_gain(policies, "absent") is None
    assert gold_gain({"sft": {"gold": 1.0, "gold_std": 0.0}, "ppo": {"gold": 4.0}}, "ppo") is None


def test_accuracy_is_held_against_what_is_known():
    facts = {"accuracy": 0.75, "bayes_accuracy": 0.8, "longer_wins": 0.7}
    assert describe_reward_model(facts, 2048) == (
        "It picks the preferred reply in 75.0% of 2,048 pairs it had not seen. Nobody can do better than "
        "80.0% on average, because labels are noisy: it is 5.0 points below that ceiling. Always picking "
        "the longer reply is right in 70.0%, 5.0 points less."
    )
    assert describe_reward_model({"accuracy": 0.5, "longer_wins": 0.625}, 0) == (
        "It picks the preferred reply in 50.0% of pairs it had not seen. Always picking the longer reply "
        "is right in 62.5%, 12.5 points more."
    )
    assert "0.5 points above that ceiling" in describe_reward_model(
        {"accuracy": 0.805, "bayes_accuracy": 0.8}, 9
    )
    assert describe_reward_model({"longer_wins": 0.6}, 9) == ""
