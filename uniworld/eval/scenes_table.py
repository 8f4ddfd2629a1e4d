"""The score table: columns, overall rows, floors; and the same as JSON."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from uniworld.eval.scenes_columns import COLUMNS, OVERALL_FLOORS, PSNR_FLOOR_DB, Column
from uniworld.eval.scenes_score import Verdict

FULL_NUM = 500  # items a column, from which on a floor counts
GOAL = 0.9
TITLES = {
    "understanding": "Understanding",
    "t2i": "Text to image",
    "edit": "Editing",
    "perceive": "Perception",
    "routing": "Routing",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. value: from 0 to 1, or in `unit`. floor: what a model must reach, None where nothing is asked."""

    group: str
    name: str
    num: int
    value: float
    unit: str = "%"
    floor: float | None = None
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.floor is None else self.value >= self.floor

    def told(self) -> str:
        return f"{100 * self.value:.1f} %" if self.unit == "%" else f"{self.value:.1f} {self.unit}"

    def floor_told(self) -> str:
        if self.floor is None:
            return ""
        return f"{100 * self.floor:.0f} %" if self.unit == "%" else f"{self.floor:.0f} {self.unit}"


def rows_of(verdicts: Sequence[Verdict]) -> list[Row]:
    """The lines of the table, group by group, with the overall ones after those that they sum up."""
    by_column = defaultdict(list)
    for verdict in verdicts:
        by_column[verdict.column].append(verdict)
    rows: list[Row] = []
    for group in TITLES:
        columns = [column for column in COLUMNS if column.group == group and by_column[column.name]]
        own = [_row(column, by_column[column.name]) for column in columns]
        rows += own
        judged = [verdict for column in columns for verdict in by_column[column.name]]
        if group in OVERALL_FLOORS and len(own) > 1:
            value = fmean(row.value for row in own)
            rows.append(Row(group=group, name="overall", num=len(judged), value=value, floor=OVERALL_FLOORS[group]))
        decibels = [verdict.measures["psnr_db"] for verdict in judged if "psnr_db" in verdict.measures]
        if decibels:
            settings = {"unit": "dB", "floor": PSNR_FLOOR_DB}
            rows.append(Row(group=group, name="outside the mask", num=len(decibels), value=fmean(decibels), **settings))
    return rows


def _row(column: Column, verdicts: Sequence[Verdict]) -> Row:
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.measures)
    measures = {name: fmean(v.measures[name] for v in verdicts if name in v.measures) for name in names}
    value = fmean(verdict.score for verdict in verdicts)
    return Row(
        group=column.group,
        name=column.kind or "accuracy",
        num=len(verdicts),
        value=value,
        floor=column.floor,
        measures=measures,
    )


def overall(rows: Sequence[Row], group: str, measure: str | None = None) -> float | None:
    """The mean over a group's columns of their score, or of a measure beside it; None where there are none."""
    columns = [row for row in rows if row.group == group and row.unit == "%" and row.name != "overall"]
    values = [row.value if measure is None else row.measures.get(measure) for row in columns]
    return fmean(found) if (found := [value for value in values if value is not None]) else None


def by_kind(verdicts: Sequence[Verdict], column: str) -> dict[str, dict[str, float]]:
    """Of a column, the score of each kind of question, request or change, and how many there were."""
    scores = defaultdict(list)
    for verdict in verdicts:
        if verdict.column == column:
            scores[verdict.kind].append(verdict.score)
    return {kind: {"num": len(found), "score": fmean(found)} for kind, found in sorted(scores.items())}


def as_json(settings: dict, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict:
    """Everything that was measured, for other programs."""
    return {
        "settings": settings,
        "rows": [
            {
                "group": row.group,
                "name": row.name,
                "num": row.num,
                "value": row.value,
                "unit": "share" if row.unit == "%" else row.unit,
                "floor": row.floor,
                "met": row.met,
                "measures": row.measures,
            }
            for row in rows
        ],
        "by_kind": {
            column: kinds
            for column in dict.fromkeys(verdict.column for verdict in verdicts)
            if (kinds := by_kind(verdicts, column)).keys() != {""}
        },
    }
