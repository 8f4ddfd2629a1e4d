"""The command `export`."""

import sys
from pathlib import Path


def export(checkpoint: Path, output: Path, *, ema: bool, connectors_only: bool, overwrite: bool, quiet: bool) -> None:
    """Write the model of a training checkpoint, print its folder, and say on stderr how to load it."""
    from uniworld.cli_draw import silence_libraries
    from uniworld.train.export import export as export_checkpoint

    silence_libraries()
    done = export_checkpoint(
        checkpoint, output, ema=ema, connectors_only=connectors_only, overwrite=overwrite, progress=not quiet
    )
    print(done.folder, flush=True)
    if quiet:
        return
    kind = "averaged" if ema else "trained"
    more = "".join(f" --{part} {path}" for part, path in done.parts.items())
    use = f"model.connectors={done.folder}" if connectors_only else f"--model {done.folder}{more}"
    print(f"step {done.step}: {len(done.names)} {kind} tensors; use it with {use}", file=sys.stderr)
