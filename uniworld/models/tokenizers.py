"""Loads tokenizers just as their folders define them."""

from pathlib import Path
from typing import Any

CLASSES = ("Qwen2Tokenizer", "CLIPTokenizer", "T5Tokenizer")


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a folder.

    `tokenizer.json` is taken as it stands where there is one: the named classes of transformers 5 rebuild it by rules
    of their own and, for T5, silently add a space in front (other ids than transformers 4 and the authors' code).

    Args:
        folder: with tokenizer.json, or with the files of the older layout (vocab.json, merges.txt).
        name: the class in transformers that reads the older layout, one of `CLASSES`.

    Raises:
        FileNotFoundError: neither is there.
    """
    import transformers

    folder = Path(folder)
    if name not in CLASSES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(CLASSES)}")
    if (folder / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, padding_side="right")
    if not (folder / "vocab.json").is_file():
        raise FileNotFoundError(f"{folder}: has neither tokenizer.json nor vocab.json")
    return getattr(transformers, name).from_pretrained(folder, padding_side="right")
