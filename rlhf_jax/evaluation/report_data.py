"""What preference data is like, as printed lines and as ``report.html``. Imports statistics, figures, report pieces."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from rlhf_jax import storage
from rlhf_jax.data.readers import longer_wins, split_by_group, split_by_row
from rlhf_jax.data.rows import Preference
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import plots, plots_data, plots_style
from rlhf_jax.evaluation import preference_statistics as statistics
from rlhf_jax.evaluation import report_html as page
from rlhf_jax.evaluation import report_parts as parts
from rlhf_jax.evaluation.report_html import number, text

# As many contradictions as one wants to read.
NUM_LISTED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything a data report shows. left_out: (source, reason) of each record that was skipped.

    leaks: (between which rows, Leakage), for splits that were given or that could be made. known_ceiling: the mean of
    max(p, 1-p) where the rows say their probability, else None. labels: of each of several objectives.
    """

    rows: Mapping[str, int]
    left_out: Sequence[tuple[str, str]]
    lengths: statistics.Lengths
    longer_wins: float
    length_bias: Sequence[statistics.LengthBin]
    consistency: statistics.Consistency
    agreement: statistics.Agreement | None
    leaks: Sequence[tuple[str, statistics.Leakage]]
    known_ceiling: float | None
    labels: Sequence[statistics.Labels] = ()


def examine(
    splits: Mapping[str, Sequence[Preference]],
    *,
    left_out: Sequence[tuple[str, str]] = (),
    held_out_fraction: float = 0.1,
    seed: int = 0,
) -> Findings:
    """Measures the rows of all splits together, and what later splits share with the first.

    Args:
      splits: name -> rows, the training rows first; of one split alone, it is shown what a division into training and
        held-out rows would share, by group and by row.
      left_out: of the readers' reports.
      held_out_fraction, seed: of that division; 0 makes none.
    """
    rows = [row for found in splits.values() for row in found]
    names = list(splits)
    leaks = [
        (f"{name} with {names[0]}", statistics.leakage(splits[names[0]], splits[name])) for name in names[1:]
    ]
    if len(splits) == 1 and held_out_fraction:
        for way, divide in (("by group", split_by_group), ("by row", split_by_row)):
            try:
                train, held_out = divide(rows, held_out_fraction=held_out_fraction, seed=seed)
            except InputError:  # one group alone: what cannot be divided leaks nothing
                continue
            leaks.append((f"{held_out_fraction:.0%} held out {way}", statistics.leakage(train, held_out)))
    lengths, tallies = statistics.lengths(rows), statistics.tallies(rows)
    known = [row.probability for row in rows]
    return Findings(
        rows={name: len(found) for name, found in splits.items()},
        left_out=left_out,
        lengths=lengths,
        longer_wins=longer_wins(rows),
        length_bias=statistics.length_bias(lengths),
        consistency=statistics.consistency(tallies),
        agreement=statistics.agreement(tallies),
        leaks=leaks,
        known_ceiling=None if None in known else sum(max(p, 1 - p) for p in known) / len(known),
        labels=statistics.labels(rows),
    )


def summary(found: Findings) -> list[str]:
    """The findings as lines for a terminal, without line ends."""
    consistency, said = found.consistency, found.agreement
    pairs = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    lines = [f"pairs          {pairs}; {len(found.left_out):,} records left out"]
    lines += [f"  {source} {reason}" for source, reason in found.left_out[:NUM_LISTED]] + _more(
        found.left_out
    )
    for name in ("prompt", "chosen", "rejected"):
        values = getattr(found.lengths, name)
        lines.append(
            f"{name:<14} {values.mean():,.0f} characters on average, {_middle(values):,} in the middle, "
            f"{values.max():,} at most"
        )
    lines.append(f"longer wins    {found.longer_wins:.1%} (a tie counts one half)")
    lines += [
        f"  {plots_data.bin_label(one):>12} times as long: {one.longer_wins:.1%} of {one.count:,}"
        for one in found.length_bias
    ]
    lines.append(
        f"contradictions {len(consistency.contradicted):,} of {consistency.pairs:,} different pairs are labelled both "
        f"ways; {consistency.repeated:,} rows repeat a pair"
    )
    lines += [f"  {', '.join(sources[:6])}" for sources in consistency.contradicted[:NUM_LISTED]]
    lines += _more(consistency.contradicted)
    lines.append(
        f"cycles         {consistency.cyclic_pairs:,} pairs of {consistency.cyclic_prompts:,} prompts lie on one; no "
        f"scalar reward agrees with more than {consistency.reachable:.1%} of the labels"
    )
    lines += [f"agreement      {_agreement(said)}", f"ceiling        {_ceiling(found)}"]
    lines += [
        f"labels         by {one.objective}: {one.judged:,} pairs, {one.tied:,} of them ties; {one.with_chosen:.1%} "
        f"for the chosen response, {one.longer_wins:.1%} for the longer one"
        for one in found.labels
    ]
    lines += [
        f"shared         {name}: of {leak.rows:,} rows {leak.prompts:,} share a prompt, {leak.groups:,} a group, "
        f"{leak.responses:,} a response, {leak.pairs:,} the pair"
        for name, leak in found.leaks
    ]
    return lines


def _more(found: Sequence) -> list[str]:
    return [f"  and {len(found) - NUM_LISTED:,} more"] if len(found) > NUM_LISTED else []


def _middle(values) -> int:
    return int(sorted(values)[len(values) // 2])


def _agreement(said: statistics.Agreement | None) -> str:
    if said is None:
        return "not known: no pair was judged by several annotators"
    return (
        f"two annotators agree on {said.two_agree:.1%} ({said.pairs:,} pairs judged by several; "
        f"{said.neither:.1%} of the votes are for neither)"
    )


def _ceiling(found: Findings) -> str:
    """What a reward model can reach, in one sentence."""
    said, reachable = found.agreement, found.consistency.reachable
    known = (
        ""
        if found.known_ceiling is None
        else f"{found.known_ceiling:.1%} of the labels, by their known probabilities; "
    )
    if said is None:
        return known or f"not known without agreement; at most {reachable:.1%} of these labels"
    low, high = said.single_bounds
    return (
        f"{known}a single annotator's votes: between {low:.1%} and {high:.1%}, {said.single:.1%} by a fitted "
        f"Beta({said.concentration:.2g}, {said.concentration:.2g}); these labels: {min(said.labels, reachable):.1%}"
    )


def write_data_report(workdir: str | os.PathLike, title: str, found: Findings) -> pathlib.Path:
    """Writes ``workdir/report.html`` over any older one, and returns its path.

    Raises:
      InputError: it cannot be written.
    """
    path = pathlib.Path(workdir) / "report.html"
    try:
        storage.make_directory(path.parent)
        storage.replace(path, data_page(title, found))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another --workdir.") from None
    return path


def data_page(title: str, found: Findings) -> str:
    """The page, as HTML."""
    sections = [
        page.section(
            "lengths",
            "Lengths, and whether they decide",
            page.paragraph(
                "A reward model that only counts characters is right as often as the longer response wins. What it "
                "learns beyond that is what it is worth."
            ),
            page.figures(
                [
                    page.figure(
                        plots_data.lengths_figure(found.lengths),
                        name="lengths",
                        title="Characters a response",
                        caption="Outlined: chosen. Filled: rejected.",
                    ),
                    page.figure(
                        plots_data.length_bias_figure(found.length_bias),
                        name="length-bias",
                        title="How often the longer one wins",
                        caption=f"Over all pairs {number(found.longer_wins, '.1%')}. At the dashed line length says "
                        "nothing.",
                    ),
                ]
            ),
        ),
        page.section("ceiling", "What can be reached", *_ceiling_parts(found)),
        page.section("consistency", "Contradictions and cycles", *_consistency_parts(found.consistency)),
        page.section("labels", "Labels by objectives", _labels(found.labels)),
        page.section("leaks", "What splits share", _leaks(found.leaks)),
        page.section("data", "What was left out", _listed("Left out", found.left_out)),
    ]
    facts = " · ".join(f"{name}: {count:,} pairs" for name, count in found.rows.items())
    header = (
        f'<header>\n<p class="kicker">Preference data</p>\n<h1>{text(title)}</h1>\n'
        f'<p class="facts">{text(facts)}</p>\n{_header_findings(found)}\n</header>'
    )
    body = "\n".join([header, *filter(None, sections), parts.footer("the rows themselves")])
    return page.page(f"Preference data: {title}", body)


def _header_findings(found: Findings) -> str:
    said = found.agreement
    items = [(number(found.longer_wins, ".1%"), "of the pairs are won by the longer response")]
    if said is not None:
        items.append((number(said.two_agree, ".1%"), "is how often two annotators agree"))
    items.append((number(found.consistency.reachable, ".1%"), "of the labels, at most, fit any one reward"))
    cells = "".join(f"<li><b>{value}</b><span>{beside}</span></li>" for value, beside in items)
    return f'<ul class="findings">{cells}</ul>'


def _ceiling_parts(found: Findings) -> list[str]:
    said = found.agreement
    told = page.paragraph(text(f"Ceiling: {_ceiling(found)}. Agreement: {_agreement(said)}."))
    marks = [("the longer response wins", found.longer_wins, plots_style.MUTED)]
    if said is not None:
        marks.append(("two annotators agree", said.two_agree, plots_style.MUTED))
        marks.append(("ceiling: one annotator's votes", said.single, plots_style.INK))
        marks.append(
            ("ceiling: these labels", min(said.labels, found.consistency.reachable), plots_style.INK)
        )
    if found.known_ceiling is not None:
        marks.append(("ceiling: known probabilities", found.known_ceiling, plots_style.INK))
    drawn = page.figure(
        plots.accuracy_figure(marks),
        name="accuracy",
        title="What accuracy is to be held against",
        caption="The best reward model knows what most people would say of a pair, and still disagrees with those "
        "who say otherwise.",
    )
    return [told, page.figures([drawn])]


def _consistency_parts(found: statistics.Consistency) -> list[str]:
    rows = [
        ["different pairs", number(found.pairs, ",")],
        ["rows that repeat a pair", number(found.repeated, ",")],
        ["pairs labelled both ways", number(len(found.contradicted), ",")],
        ["pairs on a cycle of majorities", number(found.cyclic_pairs, ",")],
        ["prompts with a cycle", number(found.cyclic_prompts, ",")],
        ["share of labels a scalar reward can fit, at most", number(found.reachable, ".2%")],
    ]
    told = page.paragraph(
        "Bradley-Terry gives each response one reward, so that preferences are transitive. Where a is preferred to b, "
        "b to c and c to a, some label must be given up."
    )
    contradicted = [(sources[0], f"and {', '.join(sources[1:6])}") for sources in found.contradicted]
    return [told, page.table(["", "Count"], rows, "small"), _listed("Labelled both ways", contradicted)]


def _labels(found: Sequence[statistics.Labels]) -> str:
    head = ["Objective", "Judged", "Ties", "For the chosen one", "For the longer one"]
    rows = [
        [
            text(one.objective),
            number(one.judged, ","),
            number(one.tied, ","),
            number(one.with_chosen, ".1%"),
            number(one.longer_wins, ".1%"),
        ]
        for one in found
    ]
    return page.table(head, rows, "small") if rows else ""


def _leaks(leaks: Sequence[tuple[str, statistics.Leakage]]) -> str:
    head = ["Rows", "In all", "Same prompt", "Same group", "A same response", "Same pair"]
    rows = [
        [text(name), *(number(value, ",") for value in dataclasses.astuple(leak))] for name, leak in leaks
    ]
    return page.table(head, rows, "small") if rows else ""


def _listed(title: str, found: Sequence[tuple[str, str]]) -> str:
    if not found:
        return ""
    items = "".join(f"<li><b>{text(source)}</b> {text(reason)}</li>" for source, reason in found[:NUM_LISTED])
    more = f"<li>and {len(found) - NUM_LISTED:,} more</li>" if len(found) > NUM_LISTED else ""
    return page.folded(title, f"{len(found):,}", f"<ul>{items}{more}</ul>")
