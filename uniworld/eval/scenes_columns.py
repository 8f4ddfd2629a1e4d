"""The columns of the score table, and the held-out items of each."""

import itertools
from dataclasses import dataclass

from uniworld.data.scenes.captions import PROMPT_KINDS
from uniworld.data.scenes.edits import KINDS
from uniworld.data.scenes.perception import TASKS
from uniworld.data.scenes.tasks import Item, make_item

SPLIT = "held-out"
SUITE = 20250  # in every item's seed, so that no other use of the split has the same; another one is another suite
ROUTED = ("understanding", "edit", "understanding", "t2i", "understanding", "perceive", "understanding", "compose")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column. group: understanding, t2i, edit, perceive or routing. kind: of its items, "" for any. floor: the
    score that a model must reach to be shipped, None where none is asked."""

    group: str
    kind: str = ""
    floor: float | None = None

    @property
    def name(self) -> str:
        return f"{self.group} {self.kind}".strip()

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return self.name.replace(" ", "-")

    @property
    def draws(self) -> bool:
        """Whether a picture is asked for."""
        return self.group in ("t2i", "edit", "perceive")


COLUMNS = (
    Column(group="understanding", floor=0.8),
    *(Column(group="t2i", kind=kind) for kind in PROMPT_KINDS),
    *(Column(group="edit", kind=kind, floor=0.25) for kind in KINDS),
    *(Column(group="perceive", kind=task, floor=0.5 if task == "segment" else None) for task in TASKS),
    Column(group="routing", floor=0.98),
)
GROUPS = tuple(dict.fromkeys(column.group for column in COLUMNS))
OVERALL_FLOORS = {"t2i": 0.5, "edit": 0.5}  # of the mean of a group's columns
PSNR_FLOOR_DB = 20.0


def chosen(names: str | None) -> tuple[Column, ...]:
    """The columns of a list such as "t2i,edit add,routing": groups or single columns; all of them for None.

    Raises: ValueError where a name is neither.
    """
    if names is None:
        return COLUMNS
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in GROUPS and all(name != column.name for column in COLUMNS):
            known = ", ".join((*GROUPS, "or one column such as 'edit add'"))
            raise ValueError(f"--columns {name}: must be of {known}")
    return tuple(column for column in COLUMNS if column.group in wanted or column.name in wanted)


def item_of(column: Column, seed: int, index: int, size_px: int) -> Item:
    """The index-th item of a column; the same arguments give the same item. No two columns share their scenes."""
    numbers = SUITE, seed, COLUMNS.index(column), index
    if column.group == "routing":
        return make_item(ROUTED[index % len(ROUTED)], numbers, SPLIT, size_px=size_px)
    kind = f"perceive {column.kind}" if column.group == "perceive" else column.kind or None
    for attempt in itertools.count():
        item = make_item(column.group, (*numbers, attempt), SPLIT, kind=kind, size_px=size_px)
        if _fits(column, item):
            return item


def question_index(item: Item) -> int:
    """Of an item of understanding, the last question with a short answer; -1 where there is none."""
    return max((i for i, question in enumerate(item.facts) if not question.kind.startswith("caption")), default=-1)


def _fits(column: Column, item: Item) -> bool:
    """GenEval's kinds ask for no style: in some, colours do not show. Captions have no one right answer."""
    if column.group == "t2i":
        return item.facts.style is None
    return column.group != "understanding" or question_index(item) >= 0
