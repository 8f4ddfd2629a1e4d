"""Writes small data sets for tests, in the formats that the loader reads."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from uniworld.config import TrainConfig, from_dict

WORDS = "a red cat sits under the old blue tree and looks at seven quiet birds near a river".split()  # noqa: SIM905


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours."""
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def edited(image: Image.Image, share: float = 0.25) -> Image.Image:
    """The picture with a square of this share of its area inverted."""
    pixels = np.array(image)
    height, width = (max(1, round(side * share**0.5)) for side in pixels.shape[:2])
    pixels[:height, :width] += 128
    return Image.fromarray(pixels)


def caption(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words))


def turns(text: str, num_references: int = 0) -> list[dict]:
    return [
        {"from": "human", "value": "<image>" * num_references + text},
        {"from": "gpt", "value": "<gen_image>"},
    ]


def write_authors(
    folder: Path,
    num_references: list[int],
    *,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),),
    seed: int = 0,
    name: str = "edits",
    need_weight: bool = True,
    num_words: int | None = None,
    focus: list | None = None,
) -> Path:
    """A `data.txt` with one annotation file; sample i has `num_references[i]` inputs and size `sizes[i % len]`.

    Captions have `num_words` words, or 1 to 11.
    """
    rng = np.random.default_rng(seed)
    images = folder / f"{name}-images"
    images.mkdir(parents=True)
    records = []
    for i, n in enumerate(num_references):
        base = picture(rng, *sizes[i % len(sizes)])
        names = []
        for j in range(n):
            names.append(f"{i}-{j}.png")
            base.save(images / names[-1])
        (edited(base) if n else base).save(images / f"{i}.png")
        text = caption(rng, num_words or int(rng.integers(1, 12)))
        more = {} if focus is None else {"focus": focus}
        records.append({"image": [*names, f"{i}.png"], "conversations": turns(text, n)} | more)
    (folder / f"{name}.json").write_text(json.dumps(records))
    with (folder / "data.txt").open("a") as file:
        file.write(f"{name}-images,{name}.json,{str(need_weight).lower()}\n")
    return folder / "data.txt"


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def data_config(*paths: Path | dict, seed: int = 0, **settings) -> TrainConfig:
    """A config whose targets are square and 64x64 px, read in the training process, unless `settings` say else."""
    sources = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
    data = {"sources": sources, "anchor_px": 64 * 64, "num_ratios": 1, "vlm_max_px": 112 * 112, "num_workers": 0}
    return from_dict(TrainConfig, {"seed": seed, "data": data | settings})
