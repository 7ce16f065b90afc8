"""Tables from the rows in results/: means and deviations over seeds, paired differences, and missing runs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.common import NOT_MEASURED, Table, markdown
from studies.definitions import Study, Variant
from studies.published import PUBLISHED

NOT_RUN = "not run"

GLANCE = (("CIFAR-10", "resnet32-s16u1-double"), ("CIFAR-10", "resnet56-s16u1-double"),
          ("CIFAR-100", "resnet34-s32u1"), ("ImageNet", "resnet34-s32u1-double"), ("ImageNet", "mobilenetv2-shared++"))
"""The published networks to show in the README."""


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """A finished run; the fields are the columns. Errors are percentages of test images."""

    date: str
    commit: str
    study: str
    variant: str
    network: str
    settings: str
    seed: int
    epochs: int
    device: str
    python: str
    jax: str
    flax: str
    parameters: int
    macs: int
    wall_seconds: float
    images_per_second: float
    final_error: float
    best_error: float
    best_epoch: int
    chosen_on: str
    penalty: str
    norm_min: str
    norm_mean: str
    norm_max: str
    coherence: str
    command: str


def of(rows: Sequence[StudyRow], variant: Variant) -> dict[int, StudyRow]:
    """Returns the latest run of a variant for each seed."""
    return {row.seed: row for row in rows if row.variant == variant.label and row.network == variant.network}


def mean_and_deviation(values: Sequence[float]) -> str:
    """Returns 'mean ± standard deviation (n)', or only the value if there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f} (1)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of n ≥ 2 paired differences and its 95 % confidence interval by Student's t."""
    from scipy import stats

    mean = statistics.mean(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def difference(rows: dict[int, StudyRow], reference: dict[int, StudyRow]) -> str:
    """Returns the difference of the final error from the reference's, paired by seed, in percentage points."""
    seeds = sorted(rows.keys() & reference.keys())
    if len(seeds) < 2:
        return NOT_MEASURED
    mean, low, high = interval([rows[seed].final_error - reference[seed].final_error for seed in seeds])
    verdict = "" if low <= 0 <= high else " better" if mean < 0 else " worse"
    shown = [round(value, 2) + 0.0 for value in (mean, low, high)]  # -0.0 + 0.0 is 0.0
    return f"{shown[0]:+.2f} [{shown[1]:+.2f}, {shown[2]:+.2f}]{verdict}"


def verdicts(study: Study, rows: Sequence[StudyRow]) -> Table:
    """Returns the outcome of each hypothesis of the study."""
    by_label = {variant.label: of(rows, variant) for variant in study.variants}
    lines: Table = [["hypothesis", "difference of final errors, points", "outcome"]]
    for hypothesis in study.hypotheses:
        one, other = by_label[hypothesis.variant], by_label[hypothesis.reference]
        seeds = sorted(one.keys() & other.keys())
        differences = [one[seed].final_error - other[seed].final_error for seed in seeds]
        if len(seeds) < 2:
            shown = f"{differences[0]:+.2f} (one seed)" if seeds else NOT_MEASURED
            lines.append([hypothesis.claim, shown, "too few runs" if seeds else NOT_RUN])
            continue
        mean, low, high = interval(differences)
        outcome = ("confirmed" if high < hypothesis.margin else "refuted" if low > hypothesis.margin
                   else "not decided (within noise)")
        few = f", by {len(seeds)} of {study.seeds} seeds" if len(seeds) < study.seeds else ""
        lines.append([hypothesis.claim, f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", outcome + few])
    return lines


def table(study: Study, rows: Sequence[StudyRow]) -> Table:
    """Returns the table of a study with all of its variants, including those without runs."""
    head = ["variant", "parameters", "MACs", "final test error, %", "best epoch's, %",
            "final error minus the first row's", "penalty", "norms", "minutes per run"]
    published = {row.name: row.error for row in PUBLISHED if row.dataset == study.published}
    lines: Table = [[*head, *(["published, %"] if published else [])]]
    for group in study.groups:
        reference = of(rows, group[0])
        for variant in group:
            runs = of(rows, variant)
            line = [variant.label, *(_cells(runs) if runs else [NOT_RUN] + [NOT_MEASURED] * (len(head) - 2))]
            if runs:
                line.insert(5, NOT_MEASURED if variant is group[0] else difference(runs, reference))
            if published:
                error = "" if variant.settings else published.get(variant.network, "")
                line.append(error or NOT_MEASURED)
            lines.append(line)
    return lines


def _cells(runs: dict[int, StudyRow]) -> list[str]:
    """Returns the cells of a variant with runs, except for the difference."""
    values = list(runs.values())
    first = values[0]
    with_bases = [row for row in values if row.penalty]
    norms = NOT_MEASURED if not with_bases else (f"{min(float(row.norm_min) for row in with_bases):.2f} – "
                                         f"{max(float(row.norm_max) for row in with_bases):.2f}")
    penalty = f"{statistics.mean(float(row.penalty) for row in with_bases):.1e}" if with_bases else NOT_MEASURED
    return [f"{first.parameters:,}", f"{first.macs:,}", mean_and_deviation([row.final_error for row in values]),
            mean_and_deviation([row.best_error for row in values]), penalty, norms,
            f"{statistics.median(row.wall_seconds for row in values) / 60:.1f}"]


def paired(study: Study, rows: Sequence[StudyRow], pairs: Sequence[tuple[str, str]]) -> Table:
    """Returns the paired differences of those `pairs` of labels that have runs, second minus first."""
    by_label = {variant.label: of(rows, variant) for variant in study.variants}
    return [["change", "final error: second minus first"], *(
        [f"{one} → {other}", difference(by_label[other], by_label[one])] for one, other in pairs
        if by_label[one] and by_label[other])]


def overview(studies: Mapping[str, Study], rows: Mapping[str, Sequence[StudyRow]]) -> Table:
    """Returns a line per study: how much of it was run, and which differences are statistically significant.

    The differences are its hypotheses and contrasts, and those between each variant and the first one of its group.
    """
    lines: Table = [["study", "runs", "differences of the final error, in points, whose interval excludes 0",
                     "within noise"]]
    for name, study in studies.items():
        done = sum(len(of(rows[name], variant)) for variant in study.variants)
        if not done:
            lines.append([study.title, NOT_RUN, NOT_MEASURED, NOT_MEASURED])
            continue
        from_first = [(group[0].label, variant.label) for group in study.groups for variant in group[1:]]
        asked = [(hypothesis.reference, hypothesis.variant) for hypothesis in study.hypotheses]
        judged = paired(study, rows[name], list(dict.fromkeys((*from_first, *asked, *study.contrasts))))[1:]
        clear = [f"{change}: {found}" for change, found in judged if found.endswith(("better", "worse"))]
        unclear = sum(found.endswith("]") for _, found in judged)
        lines.append([study.title, f"{done} of {len(study.variants) * study.seeds}", "; ".join(clear) or "none",
                      f"{unclear} of {len(clear) + unclear}"])
    return lines


def glance(networks: str, studies: Mapping[str, Study], rows: Mapping[str, Sequence[StudyRow]]) -> Table:
    """Returns the table for the README: savings of some published networks, and the results of training here.

    Args:
      networks: the table of `studies.published`.
    """
    lines: Table = [["network", "data", "parameters", "against plain", "MACs", "against plain", "published error, %",
                     "our own training"]]
    counted = [[cell.strip() for cell in line.split("|")[1:-1]] for line in networks.splitlines()]
    for dataset, name in GLANCE:
        (row,) = (row for row in counted if row[:2] == [dataset, f"`{name}`"])
        _, _, parameters, fewer, macs, fewer_macs, error = row
        lines.append([f"`{name}`", dataset, _millions(parameters), _change(fewer), _millions(macs), _change(fewer_macs),
                      error, _trained(dataset, name, studies, rows)])
    return lines


def _millions(number: str) -> str:
    millions = int(number.replace(",", "")) / 1e6
    return f"{millions:,.0f}M" if millions >= 100 else f"{millions:.3g}M"


def _change(fewer: str) -> str:
    """Returns a saving in percent as a signed change."""
    change = round(-float(fewer.removesuffix(" %")))
    return f"{change:+d} %" if change else "0 %"


def _trained(dataset: str, name: str, studies: Mapping[str, Study], rows: Mapping[str, Sequence[StudyRow]]) -> str:
    """Returns the final errors of a network on a data set, or on a copy of it; or that there are none."""
    found = []
    for key, study in studies.items():
        errors = [row.final_error for variant in study.variants if variant.network == name and not variant.settings
                  for row in of(rows[key], variant).values()]
        if errors and study.title.startswith((f"{dataset},", f"{dataset} (")):
            found.append(f"{mean_and_deviation(errors)} on {study.title}")
    return "; ".join(found) or NOT_RUN


def section(name: str, study: Study, rows: Sequence[StudyRow]) -> str:
    """Returns the section on a study in Markdown."""
    text = f"## {study.title}\n\n{study.question}\n\n"
    command = f"python -m studies.experiments --study={name}{' --images=DIR' * study.needs_images}"
    used = [row for variant in study.variants for row in of(rows, variant).values()]
    if not used:
        return f"{text}**Not run** yet: `{command}`.\n\n" + (
            f"{markdown(verdicts(study, rows))}\n" if study.hypotheses else "")
    facts = {key: ", ".join(dict.fromkeys(str(getattr(row, key)) for row in used))
             for key in ("device", "jax", "epochs", "commit")}
    dates = sorted(row.date for row in used)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    earlier = [f"{row.variant}, seed {row.seed}: {row.final_error:.2f} % on {row.device}, commit {row.commit}"
               for row in rows if row not in used and any(
                   (row.variant, row.network, row.seed) == (one.variant, one.network, one.seed) for one in used)]
    replaced = f"Earlier runs that are replaced by these: {'; '.join(earlier)}.\n\n" if earlier else ""
    return (f"{text}{len(used)} run{'s' * (len(used) > 1)} of {facts['epochs']} epochs, {span}, {facts['device']}, "
            f"JAX {facts['jax']}, commit {facts['commit']}: `results/study-{name}.csv`, by `{command}`.\n\n{replaced}"
            f"{markdown(table(study, rows))}\n"
            + (f"{markdown(paired(study, rows, study.contrasts))}\n" if study.contrasts else "")
            + (f"{markdown(verdicts(study, rows))}\n" if study.hypotheses else ""))
