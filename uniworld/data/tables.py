"""Hugging Face `datasets` folders and parquet files with image columns.

Columns are those of the authors' format (`image`: one or a list, the last is the target; `conversations`), or
`prompt`, `target` and, for edits, `references` (one or a list). `need_weight` and `focus` may stand beside either.
"""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniworld.data.samples import Picture, Sample, conversation_of, make_sample, resolve_path
from uniworld.data.sources import fingerprint_of

COLUMNS = ("image", "conversations", "prompt", "target", "references", "need_weight", "focus")
REQUIRED = (("image", "conversations"), ("prompt", "target"))


class TableSource:
    """A parquet file, a folder or glob of them, or a folder of `Dataset.save_to_disk`.

    Args:
        path: the file, folder or glob.
        columns: "prompt=edit_instruction": the table's own name of a column.
    """

    def __init__(self, path: str, columns: tuple[str, ...] = ()):
        self.name, self.stem = path, Path(path).name
        files, dataset = _open(path)
        self.folder = files[0].parent
        names = _column_names(columns)
        for ours, theirs in names.items():
            if ours != theirs and theirs not in dataset.column_names:
                raise ValueError(f"columns: {path} has no column {theirs}; it has {', '.join(dataset.column_names)}")
        self.names = {ours: theirs for ours, theirs in names.items() if theirs in dataset.column_names}
        if not any(set(layout) <= self.names.keys() for layout in REQUIRED):
            raise ValueError(
                f"{path}: must have the columns image and conversations, or prompt and target; "
                f"it has {', '.join(dataset.column_names)} (columns: [prompt=NAME, ...] renames)"
            )
        # Arrow rows hold pictures as stored, so that nothing is decoded here.
        self.dataset = dataset.select_columns(list(self.names.values())).with_format("arrow")
        self.fingerprint = fingerprint_of(files, sorted(self.names.items()))

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_id(self, index: int) -> str:
        return f"{self.stem}:{index}"

    def __getitem__(self, index: int) -> Sample:
        row = self.dataset[index].to_pylist()[0]
        row = {ours: row[theirs] for ours, theirs in self.names.items()}
        conversations = row.get("conversations")
        if conversations is not None:
            values = _as_list(row.get("image"))
        else:
            references = _as_list(row.get("references"))
            values = [*references, row.get("target")]
            conversations = conversation_of(row.get("prompt"), len(references))
        pictures = [self._picture(value, f"{self.name}:{index} picture {i}") for i, value in enumerate(values)]
        need_weight = row.get("need_weight")
        return make_sample(
            self.sample_id(index),
            conversations,
            pictures,
            need_weight=True if need_weight is None else need_weight,
            focus=row.get("focus"),
        )

    def _picture(self, value: Any, name: str) -> Picture:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            path = resolve_path(self.folder, value)
            return Picture(path, path)
        if not isinstance(value, bytes):
            raise ValueError(f"{name}: is {type(value).__name__}, must be encoded bytes or a path")
        return Picture(name, value)


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _column_names(columns: tuple[str, ...]) -> dict[str, str]:
    names = {name: name for name in COLUMNS}
    for entry in columns:
        ours, equals, theirs = entry.partition("=")
        if not equals or ours not in names:
            raise ValueError(f"columns: {entry!r} must be NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
        names[ours] = theirs
    return names


def _open(path: str) -> tuple[list[Path], Any]:
    """The files behind a path, and their `datasets.Dataset`."""
    import datasets

    folder = Path(path)
    if (folder / "state.json").is_file():
        return [folder / "state.json"], datasets.load_from_disk(path)
    pattern = f"{glob.escape(path)}/**/*.parquet" if folder.is_dir() else path
    files = sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not files:
        raise FileNotFoundError(f"{path}: no parquet files and no saved dataset")
    try:
        return files, datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error.__cause__ or error})") from None
