"""The report of a study: results.json with everything, report.md with the tables, report.html to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lego_pipeline.atomic import write_text
from lego_pipeline.study.questions import GRADES

TEMPLATE = Path(__file__).with_name("report.html")
Table: TypeAlias = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows


def write_report(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes the three files.

    Args:
        folder: is made.
        result: of `lego_pipeline.study.tally.tally`.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('the report is written with jinja2; run `pip install "lego-pipeline[eval]"`.') from error
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "result": result,
        "headline": headline(result),
        "tables": tables(result),
        "remarks": remarks(result),
        "grades": GRADES,
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "report.md", markdown(result))
    write_text(folder / "report.html", template.render(**parts))


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and remarks as Markdown."""
    lines = [f"# {headline(result)}", ""]
    for title, head, rows in tables(result):
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows] + [""]
    lines += ["## How to read this", ""] + [f"- {remark}" for remark in remarks(result)]
    return "\n".join(lines) + "\n"


def headline(result: Mapping[str, Any]) -> str:
    """Size of the study in one line."""
    questions, raters = result["questions"], [rater for rater in result["raters"] if rater["counted"]]
    kind = "picked pictures" if result["mode"] == "frames" else "rated descriptions"
    return (
        f"User study: {len(raters)} rater{'s' * (len(raters) != 1)} {kind} in {questions['answered']} of "
        f"{questions['asked']} questions, {questions['answers']} answers"
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """All tables, as text."""
    found = [_systems(result), *_tests(result), _agreement(result)]
    if result["mode"] == "frames":
        counts = result["places"]["counts"]
        rows = [[str(place), str(count)] for place, count in enumerate(counts, start=1)]
        found.append(("Places on the page", ("place", "picked"), rows))
    if result["verbs"]:
        names = list(next(iter(result["verbs"].values())))
        rows = [[verb, *map(str, counts.values())] for verb, counts in result["verbs"].items()]
        found.append(("Answers by verb", ("verb", *names), rows))
    return [*found, _raters(result)]


def remarks(result: Mapping[str, Any]) -> list[str]:
    """How the numbers were computed and what to doubt."""
    unit = "questions" if result["mode"] == "frames" else "rows"
    said = [
        f"Intervals are 95 %. The first one draws whole {unit} with all their answers: what other {unit} would give "
        "with these raters. Wilson's takes every answer as independent, and holds at 0 and 100 %.",
        f"Pairs are compared by an exact sign test over {unit}, corrected for the number of pairs (Holm).",
    ]
    if result["mode"] == "frames":
        said.append(
            "Whether systems differ at all is tested by exchanging their names within each question; the multinomial "
            "test beside it takes every answer as independent."
        )
        if result["places"]["p"] < 0.05:
            said.append(
                f"Some places on the page were picked more often than others (p = {number(result['places']['p'])}): "
                "raters may not have looked at all pictures. The order is random, so no system gains by it."
            )
    if result["agreement"]["questions_with_several"] == 0:
        said.append("No question was answered by two raters, so nothing is known about agreement.")
    left_out = [rater["rater"] for rater in result["raters"] if not rater["counted"]]
    if left_out:
        said.append(
            f"Left out, with less than {100 * result['attention']:g} % of the attention checks right: "
            f"{', '.join(left_out)}."
        )
    sealed = sum(rater["sealed"] for rater in result["raters"])
    said.append(
        f"{sealed} of {len(result['raters'])} votes files carry the seal of the study's server. The digest of the "
        "others shows changes by accident, not a rater who forges votes on purpose."
    )
    return said


def number(p: float) -> str:
    """A p-value in words of a table."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.1f} %"


def between(interval: Sequence[float]) -> str:
    """An interval of shares."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _share_cells(share: Mapping[str, Any]) -> list[str]:
    return [f"{share['count']} of {share['of']}", percent(share["share"]), between(share["interval"]),
            between(share["wilson"])]  # fmt: skip


def _systems(result: Mapping[str, Any]) -> Table:
    if result["mode"] == "frames":
        ordered = sorted(result["systems"], key=lambda system: -system["share"])
        head = ("system", "picked", "share", "interval", "Wilson")
        return "Picked as best", head, [[system["name"], *_share_cells(system)] for system in ordered]
    rows = []
    for system in result["systems"]:
        rows += [[system["name"], grade, *_share_cells(share)] for grade, share in system["grades"].items()]
        if system["hallucinated_of_not_right"]:
            rows.append(
                [
                    system["name"],
                    "hallucinated, of those not right",
                    *_share_cells(system["hallucinated_of_not_right"]),
                ]
            )
    return "Descriptions", ("system", "grade", "answers", "share", "interval", "Wilson"), rows


def _tests(result: Mapping[str, Any]) -> list[Table]:
    found, tests = [], result["tests"]
    if "any" in tests:
        rows = [[test["method"], number(test["p"])] for test in (tests["any"], tests["any_independent"])]
        found.append(("Do the systems differ at all?", ("test", "p"), rows))
    if tests["pairs"]:
        rows = [
            [p["first"], p["second"], str(p["won"]), str(p["lost"]), str(p["tied"]), number(p["p"]),
             number(p["p_holm"])]
            for p in tests["pairs"]
        ]  # fmt: skip
        unit = "Questions" if result["mode"] == "frames" else "Rows"
        head = ("first", "second", "first ahead", "second ahead", "tied", "p", "p, Holm")
        found.append((f"{unit} in which one is ahead of the other", head, rows))
    return found


def _agreement(result: Mapping[str, Any]) -> Table:
    found = result["agreement"]
    alpha, kappa, interval = found["krippendorff_alpha"], found["fleiss_kappa"], found["krippendorff_interval"]
    rows = [
        ["questions with two or more raters", str(found["questions_with_several"])],
        ["pairs of raters with the same answer", "none" if found["same"] is None else percent(found["same"])],
        ["Krippendorff's alpha", "none" if alpha is None
         else f"{alpha:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"],
        ["Fleiss' kappa", "none" if kappa is None else f"{kappa:.2f}"],
    ]  # fmt: skip
    return "Agreement of raters (1 full, 0 chance)", ("measure", "value"), rows


def _raters(result: Mapping[str, Any]) -> Table:
    rows = [
        [r["rater"], str(r["answers"]), f"{r['checks_right']} of {r['checks']}",
         "" if r["seconds_median"] is None else f"{r['seconds_median']:.1f} s",
         "yes" if r["sealed"] else "no", "yes" if r["counted"] else "no"]
        for r in result["raters"]
    ]  # fmt: skip
    head = ("rater", "answers", "checks right", "median time", "sealed", "counted")
    return "Raters", head, rows
