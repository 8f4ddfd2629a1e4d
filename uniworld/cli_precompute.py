"""The command `precompute`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from uniworld.checkpoint.progress import count_progress
from uniworld.config import load_config


def precompute(
    config: Path, output: Path, overrides: Sequence[str], samples_per_shard: int | None, quiet: bool
) -> None:
    """Fill a cache folder, print its name, and say on stderr how to train from it."""
    settings = load_config(config, overrides)

    import torch

    from uniworld.cli_draw import silence_libraries
    from uniworld.data.bad import TooManyBadSamples
    from uniworld.train import precompute as room

    silence_libraries()
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    shown = rank == 0 and not quiet
    try:
        with count_progress("Encoding", shown) as progress:
            done = room.precompute(
                settings,
                output,
                samples_per_shard=samples_per_shard or room.SAMPLES_PER_SHARD,
                rank=rank,
                world_size=world_size,
                device=device,
                progress=progress,
                show_loading=shown,
            )
    except TooManyBadSamples as error:
        print(error.table, file=sys.stderr)
        raise ValueError(str(error).removesuffix(error.table)) from None
    if rank == 0:
        print(done.folder, flush=True)
    if shown:
        print(_summary(done), file=sys.stderr)


def _summary(done) -> str:
    from uniworld.train.writer import in_words

    size = f"{done.num_samples:,} samples, {in_words(done.num_bytes)}"
    if done.num_missing:
        return f"{done.num_missing} of {done.num_shards} shards are still being made by other processes"
    return f"{size} in {done.num_shards} shards; train from them with data.precomputed={done.folder}"
