"""Loads tokenizers just as their folders define them."""

from pathlib import Path
from typing import Any

CLASSES = ("Qwen2Tokenizer", "CLIPTokenizer", "T5Tokenizer")


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a folder.

    `tokenizer.json` is taken as it stands where there is one: the named classes of transformers 5 rebuild it by rules
    of their own and, for T5, silently add a space in front (other ids than transformers 4 and the authors' code).

    Args:
        folder: with tokenizer.json, or with the files of the older layout (vocab.json and merges.txt, or spiece.model).
        name: the class in transformers that reads the older layout, one of `CLASSES`.

    Raises:
        FileNotFoundError: neither is there.
    """
    import transformers

    folder = Path(folder)
    if name not in CLASSES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(CLASSES)}")
    if (folder / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, padding_side="right", local_files_only=True)
    if not any((folder / file).is_file() for file in ("vocab.json", "spiece.model")):
        raise FileNotFoundError(f"{folder}: has no tokenizer.json, vocab.json or spiece.model")
    return getattr(transformers, name).from_pretrained(folder, padding_side="right", local_files_only=True)
