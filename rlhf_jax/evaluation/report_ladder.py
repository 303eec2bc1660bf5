"""The report of a ladder: what was run, what came out, and why it looks that way. Imports the shared sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_jax.evaluation import plots, plots_style
from rlhf_jax.evaluation import report_html as page
from rlhf_jax.evaluation import report_parts as parts
from rlhf_jax.evaluation.plots_style import Look
from rlhf_jax.evaluation.report_files import Ladder, Point, Run, series, trace
from rlhf_jax.evaluation.report_findings import (
    describe_course,
    describe_reward_model,
    gold_course,
    gold_gain,
)
from rlhf_jax.evaluation.report_html import number, text

_WHAT_A_STAGE_DOES = {
    "sft": "Imitates demonstrations. Every policy below starts here.",
    "reward_model": "Learns from pairs of replies which one is preferred, and gives any reply a score: the proxy.",
    "ppo": "Reinforcement learning: raises the proxy, and pays beta for every nat of KL from SFT.",
    "dpo": "Learns from the same pairs directly, without a reward model and without sampling.",
}
# (stage, metric, what it is), for the loss curves; a metric that a run lacks is left out.
_CURVES = (
    ("sft", "nll", "How surprised the model is by a token of the demonstrations, in nats. "),
    (
        "reward_model",
        "loss",
        "How surprised it is by which reply was preferred, in nats; guessing costs 0.69. ",
    ),
    ("reward_model", "accuracy", "How often the preferred reply gets the higher score. "),
    ("ppo", "loss/policy", "The clipped surrogate: near 0 however well things go, so look at the rewards. "),
    ("ppo", "loss/value", "How far the value model is from what was earned. "),
    (
        "dpo",
        "loss",
        "How surprised its implicit reward is by which reply was preferred; guessing costs 0.69. ",
    ),
    ("dpo", "accuracy", "How often its implicit reward puts the preferred reply first. "),
)
_NAMES = {"nll": "loss", "loss/policy": "policy loss", "loss/value": "value loss"}


def ladder_page(ladder: Ladder) -> str:
    """The whole page, as HTML."""
    looks = plots_style.looks([*ladder.policies, *ladder.runs, *ladder.samples])
    traces = {name: points for name, run in ladder.runs.items() if len(points := trace(run.rows)) > 1}
    gold = any("gold" in values for values in ladder.policies.values())
    everything = ladder.runs | ({"evaluate": ladder.evaluation} if ladder.evaluation else {})
    sections = [
        page.section("policies", "What came out", parts.policies_table(ladder.policies, looks)),
        _distance(ladder, traces, looks, gold),
        page.section(
            "samples",
            "What they say",
            page.paragraph(
                "The same held-out prompts, answered by each policy; one sample each, none picked by hand."
            ),
            parts.samples_side_by_side(ladder.samples, ladder.policies, looks),
        )
        if ladder.samples
        else "",
        _reward_model(ladder),
        _over_steps(ladder, looks, gold),
        _losses(ladder, looks),
        page.section("data", "What was left out of the data", parts.data_report(everything)),
        page.section("configs", "How it was run", parts.configs(everything)),
    ]
    files = "the metrics.jsonl, summary.json, margins.json, samples.json, data.json and handoff.json of this ladder"
    body = "\n".join([_header(ladder, looks, sections), *filter(None, sections), parts.footer(files)])
    return page.page(f"RLHF ladder: {ladder.name}", body)


def _header(ladder: Ladder, looks: Mapping[str, Look], sections: Sequence[str]) -> str:
    facts = parts.origin(ladder.runs)
    if ladder.seconds:
        facts.append(f"{parts.duration(sum(ladder.seconds.values()))} in all")
    contents = {
        "policies": "What came out",
        "distance": "Reward and distance",
        "samples": "What they say",
        "reward-model": "The reward model",
        "steps": "PPO, step by step",
        "losses": "Losses",
        "data": "Data",
        "configs": "How it was run",
    }
    there = [anchor for anchor in contents if any(f'<section id="{anchor}">' in found for found in sections)]
    links = "".join(f'<a href="#{anchor}">{contents[anchor]}</a>' for anchor in there)
    return (
        f'<header>\n<p class="kicker">RLHF ladder · {text(ladder.name)}</p>\n'
        "<h1>From demonstrations to an aligned model</h1>\n"
        "<p>A language model first imitates demonstrations. A reward model learns from pairs of replies which one "
        "is preferred. Reinforcement learning then raises that learned score, the <em>proxy</em>, on a leash that "
        "charges for distance from the imitator. This page shows what each rung gained, and what becomes of a "
        f'score when it is pushed too hard.</p>\n<p class="facts">{text(" · ".join(facts))}</p>\n'
        f"{_steps(ladder, looks)}\n{_findings(ladder, looks)}\n<nav>{links}</nav>\n</header>"
    )


def _steps(ladder: Ladder, looks: Mapping[str, Look]) -> str:
    """One card a run: what it does, with the knobs that matter."""
    cards = []
    for name, run in ladder.runs.items():
        what = _WHAT_A_STAGE_DOES.get(run.stage, "")
        if run.stage == "ppo" and run.config.get("beta") == 0:
            what = "The same with beta = 0: nothing holds the policy near SFT."
        knobs = []
        schedule = run.config.get("schedule", {})
        if "num_steps" in schedule:
            knobs.append(f"{schedule['num_steps']:,} steps of {run.config.get('batch_size', '?')}")
        # Stages on pairs have it among the numbers of their loss.
        beta = run.config.get("beta", run.config.get("loss", {}).get("beta"))
        if beta is not None:
            knobs.append(f"beta {beta:g}")
        if name in ladder.seconds:
            knobs.append(parts.duration(ladder.seconds[name]))
        look = looks[name]
        cards.append(
            f"<li {page.hue(look)}><h3>{page.named(look.label, look)}</h3><p>{text(what)}</p>"
            f"<small>{text(' · '.join(knobs))}</small></li>"
        )
    return f'<ol class="steps">{"".join(cards)}</ol>'


def _findings(ladder: Ladder, looks: Mapping[str, Look]) -> str:
    """The few numbers that a reader should leave with."""
    found = []
    facts = ladder.reward_model
    if "accuracy" in facts:
        beside = (
            f" of a possible {number(facts['bayes_accuracy'], '.1%')}" if "bayes_accuracy" in facts else ""
        )
        found.append(("reward_model", number(facts["accuracy"], ".1%"), f"reward-model accuracy{beside}"))
    start = ladder.policies.get("sft", {})
    for name in ("ppo", "dpo"):
        values = ladder.policies.get(name, {})
        at = f"at KL {number(values.get('kl'), '.1f')} nats"
        if (gain := gold_gain(ladder.policies, name)) is not None:
            said = f"by {looks[name].label} over SFT, {gain[1]:+.1f} standard deviations, {at}"
            found.append((name, f"{gain[0]:+.2f} gold", said))
        elif "proxy" in values and "proxy" in start:
            moved = f"{number(start['proxy'])} → {number(values['proxy'])}"
            found.append((name, moved, f"proxy, from SFT to {looks[name].label}, {at}"))
    run = ladder.runs.get("ppo_no_leash")
    course = gold_course(trace(run.rows)) if run else None
    if course is not None and course.lost:
        found.append(
            ("ppo_no_leash", f"{course.lost:.0%}", "of the gold gained is lost again once the leash is cut")
        )
    items = "".join(
        f"<li {page.hue(looks[name])}><b>{value}</b><span>{beside}</span></li>"
        for name, value, beside in found
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def _distance(
    ladder: Ladder, traces: Mapping[str, Sequence[Point]], looks: Mapping[str, Look], gold: bool
) -> str:
    """Proxy and gold against sqrt(KL): Goodhart's curve."""
    if not traces:
        return ""
    drawn = [
        page.figure(
            plots.distance_figure(traces, ladder.policies, looks, "proxy"),
            name="distance-proxy",
            title="Proxy: what training raises",
            caption="Reward-model score of held-out replies as each policy moves away from SFT, one marker an "
            "evaluation. Single marks are policies that were measured once.",
        )
    ]
    told = page.paragraph(
        "These data have no gold reward: a rising proxy alone does not say that replies got better. Read the samples."
    )
    if gold:
        drawn.append(
            page.figure(
                plots.distance_figure(traces, ladder.policies, looks, "gold"),
                name="distance-gold",
                title="Gold: what was wanted",
                caption="The true reward of the very same replies, never trained on. Rings mark the peak of each "
                "course; where the proxy rises and gold falls, the policy exploits the reward model.",
            )
        )
        told = "".join(
            page.paragraph(
                f"<b>{page.named(looks[name].label, looks[name])}</b> {_leash(ladder.runs[name])}. "
                + text(describe_course(course))
            )
            for name, points in traces.items()
            if (course := gold_course(points)) is not None
        )
    entries = [(looks[name].label, looks[name]) for name in traces]
    entries += [
        (plots.policy_label(name, values, looks), looks[name])
        for name, values in ladder.policies.items()
        if name not in traces
    ]
    title = "Goodhart’s law: when a measure becomes a target" if gold else "Reward against distance from SFT"
    return page.section("distance", title, told, page.legend(entries), page.figures(drawn))


def _leash(run: Run) -> str:
    beta = run.config.get("beta")
    if beta is None:
        return ""
    if run.config.get("adaptive_kl_target"):
        return f"(leash steered to KL {run.config['adaptive_kl_target']:g} nats)"
    return f"(beta {beta:g})" if beta else "(beta 0: the leash is cut)"


def _reward_model(ladder: Ladder) -> str:
    run = ladder.runs.get("reward_model")
    num_pairs = len(run.margins.get("margins", ())) if run else 0
    facts = ladder.reward_model
    said = describe_reward_model(facts, num_pairs)
    if not said:
        return ""
    muted, color = plots_style.MUTED, plots_style.KNOWN["reward_model"].color
    marks = [("the longer reply wins", "longer_wins", muted), ("reward model", "accuracy", color)]
    marks.append(("ceiling: the best that noisy labels allow", "bayes_accuracy", plots_style.INK))
    shown = [(label, facts[key], paint) for label, key, paint in marks if key in facts]
    scale = page.figure(
        plots.accuracy_figure(shown),
        name="accuracy",
        title="Accuracy on held-out pairs",
        caption="Share of pairs of which the preferred reply gets the higher score. Bars start at 50%, a coin's guess.",
    )
    drawn = parts.reward_model_figures(run, "reward-model") if run else []
    top = f'<div class="beside"><div>{page.paragraph(text(said))}</div>{scale}</div>'
    return page.section("reward-model", "The reward model", top, page.figures(drawn))


def _over_steps(ladder: Ladder, looks: Mapping[str, Look], gold: bool) -> str:
    """Proxy, gold, KL and length while policies were trained by reinforcement."""
    runs = {name: run for name, run in ladder.runs.items() if series(run.rows, "kl")}
    if not runs:
        return ""
    shown = [("proxy", "Proxy", "The score of the reward model, which training raises")]
    shown += (
        [("gold", "Gold", "The true reward of the same replies, which no training ever sees")] if gold else []
    )
    shown += [
        ("kl", "KL to SFT", "Distance from SFT, nats a reply; the leash charges for it"),
        (
            "length",
            "Reply length",
            "Tokens a reply; learned rewards often favour long replies, and a policy finds out",
        ),
    ]
    drawn = []
    for key, title, caption in shown:
        lines = {name: series(run.rows, key) for name, run in runs.items()}
        dots = {name: series(run.rows, f"eval/{key}") for name, run in runs.items()}
        drawing = plots.steps_figure(lines, dots, looks, from_zero=key in ("kl", "length"))
        drawn.append(page.figure(drawing, name=f"steps-{key}", title=title, caption=f"{caption}."))
    first = {name: points[0] for name, run in runs.items() if (points := trace(run.rows))}
    zero = ", ".join(
        f"{number(point.kl, '.1g')} nats ({text(looks[name].label)})" for name, point in first.items()
    )
    said = "Faint: the replies that each step learned from. Bold with markers: held-out prompts."
    if zero:
        said += f" KL before the first step, when the policy still is SFT: {zero}."
    entries = [(looks[name].label, looks[name]) for name in runs]
    return page.section(
        "steps", "PPO, step by step", page.paragraph(said), page.legend(entries), page.figures(drawn)
    )


def _losses(ladder: Ladder, looks: Mapping[str, Look]) -> str:
    """The loss of every stage, and what else tells whether it learned."""
    drawn = []
    for name, run in ladder.runs.items():
        known = [(metric, note) for stage, metric, note in _CURVES if stage == run.stage]
        for metric, note in known or [("loss", "")]:
            drawn.append(
                parts.curve(
                    run,
                    metric,
                    name=f"curve-{len(drawn)}",
                    title=f"{looks[name].label}: {_NAMES.get(metric, metric)}",
                    color=looks[name].color,
                    note=note,
                )
            )
    told = page.paragraph(parts.HOW_CURVES_ARE_DRAWN)
    return page.section("losses", "Loss curves", told, page.figures(filter(None, drawn), "many"))
