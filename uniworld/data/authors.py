"""The authors' format: a `data.txt` whose lines name a folder of pictures and a JSON list of annotations."""

import json
from pathlib import Path

from uniworld.data.samples import Picture, Sample, as_bool, make_sample, resolve_path
from uniworld.data.sources import PackedRecords, fingerprint_of


class AuthorsSource:
    """One line of the authors' `data.txt`: a folder of pictures, a JSON list of annotations, and `need_weight`."""

    def __init__(self, image_root: Path, annotations: Path, need_weight: bool):
        self.image_root, self.need_weight = image_root, need_weight
        self.name, self.stem = str(annotations), annotations.name
        self.records = PackedRecords.pack(_read_list(annotations))
        self.fingerprint = fingerprint_of([annotations], image_root, need_weight)

    def __len__(self) -> int:
        return len(self.records)

    def sample_id(self, index: int) -> str:
        return f"{self.stem}:{index}"

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        if not isinstance(record, dict):
            raise ValueError(f"record={record!r:.80}: must be an object with image and conversations")
        names = record.get("image")
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"image={names!r:.80}: must be a path or a list of paths")
        paths = [resolve_path(self.image_root, name) for name in names]
        pictures = [Picture(path, path) for path in paths]
        need_weight = self.need_weight and as_bool("need_weight", record.get("need_weight", True))
        return make_sample(
            self.sample_id(index),
            record.get("conversations"),
            pictures,
            need_weight=need_weight,
            focus=record.get("focus"),
        )


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a JSON list of samples")
    return records


def open_authors(path: Path) -> list[AuthorsSource]:
    """Every line of a `data.txt`. Relative paths are below its folder, or else below the working folder."""
    sources = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path} line {number}"
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3:
            raise ValueError(f"{where}: must be image_root,annotations.json,need_weight, got {line.strip()!r:.120}")
        image_root, annotations = (_beside(path, field) for field in fields[:2])
        if not image_root.is_dir():
            raise FileNotFoundError(f"{where}: image_root {image_root}: no such folder")
        if not annotations.is_file():
            raise FileNotFoundError(f"{where}: {annotations}: no such file")
        sources.append(AuthorsSource(image_root, annotations, as_bool(f"{where}: need_weight", fields[2])))
    if not sources:
        raise ValueError(f"{path}: has no line image_root,annotations.json,need_weight")
    return sources


def _beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)
