"""The words of the scenes' world: captions of items, and the tokenizers of `tiny`, which learn from them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uniworld.checkpoint.locate import read_json
from uniworld.checkpoint.save import atomic_folder, write_json
from uniworld.checkpoint.tiny_tokenizers import write_clip_tokenizer, write_qwen_tokenizer, write_t5_tokenizer
from uniworld.data.scenes.captions import long_caption
from uniworld.data.scenes.tasks import MIXTURE, Item, make_item
from uniworld.data.scenes.wording import wording
from uniworld.models.prompts import DRAWN_MARK, IMAGE_MARK, PERCEPTION_PROMPTS

IDS = "ids.json"
NUM_TEXTS = 6000
NUM_MERGES = 1024
T5_TOKENS = 48  # of a prompt; the longest captions of the world are cut


def texts() -> Iterator[str]:
    """What the tokenizers learn from."""
    return learned_texts(NUM_TEXTS)


def learned_texts(num: int) -> Iterator[str]:
    """What is said in the first `num` training items, as many of every task, and the engine's own prompts.

    Not of `keep`, which says the same few sentences over and over: they would become words of their own.
    """
    yield from PERCEPTION_PROMPTS.values()
    tasks = [task for task in MIXTURE if task != "keep"]
    for task in tasks:
        for seed in range(num // len(tasks)):
            for turn in make_item(task, seed, size_px=64).conversations:
                yield turn["value"].replace(IMAGE_MARK, "").replace(DRAWN_MARK, "").strip()


def caption(item: Item) -> str:
    """What is in the last picture of an item, the wanted one, in the language of its instruction."""
    return long_caption(item.scenes[-1], wording(item.language, np.random.default_rng(item.seed)))


def open_tokenizers(folder: str | Path) -> Path:
    """A folder with the three tokenizers where a model has them, and `ids.json`; made first where it is not there.

    They are learned once and kept: between merges that shorten the texts equally, the library does not choose alike
    twice, and all parts must have the same ones.
    """
    folder = Path(folder)
    if not (folder / IDS).is_file():
        corpus = list(texts())
        with atomic_folder(folder, keep_existing=True) as temporary:
            flux = temporary / "flux"
            ids = {
                "qwen": write_qwen_tokenizer(temporary, corpus, NUM_MERGES),
                "clip": write_clip_tokenizer(flux / "tokenizer", corpus, NUM_MERGES),
                "t5": write_t5_tokenizer(flux / "tokenizer_2", corpus, NUM_MERGES, T5_TOKENS),
            }
            write_json(temporary / IDS, ids)
    return folder


def read_ids(folder: Path, name: str) -> dict[str, int]:
    """What a config needs to know of the tokenizer "qwen", "clip" or "t5"."""
    return read_json(folder / IDS)[name]
