"""How often edits succeed by how much of the picture they change, which is what region weighting is for."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from uniworld.data.scenes.edits import edit_mask
from uniworld.data.scenes.tasks import Item
from uniworld.eval.scenes_columns import COLUMNS, item_of
from uniworld.eval.scenes_score import Verdict

# Of the edited share of a picture: three regions of about a fifth of the edits each, and whole pictures. A region holds
# its upper edge.
EDGES = (0.0, 0.03, 0.06, 0.3, 1.0)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Edits whose changed share of the picture is above `low` and at most `high`.

    num: of them. success: share of right ones; changed, stayed: of the two conditions alone. inside_db: mean PSNR of
    the edited region to the exact picture. None without any.
    """

    low: float
    high: float
    num: int
    success: float | None
    changed: float | None
    stayed: float | None
    inside_db: float | None


def edited_share(item: Item) -> float:
    """The share of the pixels that an edit changes, exactly: its renders before and after are equal elsewhere."""
    return float(edit_mask(item.pictures[0], item.pictures[-1]).mean())


def by_region(verdicts: Sequence[Verdict], seed: int, size_px: int) -> list[Region]:
    """The edits among the verdicts, by size of the edited region; `seed`, `size_px` are those of the suite."""
    columns = {column.name: column for column in COLUMNS if column.group == "edit"}
    edits = [verdict for verdict in verdicts if verdict.column in columns]
    shares = [edited_share(item_of(columns[v.column], seed, v.index, size_px)) for v in edits]
    return regions(edits, shares)


def regions(edits: Sequence[Verdict], shares: Sequence[float]) -> list[Region]:
    """One region for each pair of neighbouring `EDGES`, of edits and their edited shares."""
    found = []
    for low, high in zip(EDGES, EDGES[1:]):
        own = [verdict for verdict, share in zip(edits, shares) if low < share <= high]
        names = "changed", "stayed", "inside_db"
        measures = {name: fmean(verdict.measures[name] for verdict in own) if own else None for name in names}
        success = fmean(verdict.score for verdict in own) if own else None
        found.append(Region(low=low, high=high, num=len(own), success=success, **measures))
    return found
