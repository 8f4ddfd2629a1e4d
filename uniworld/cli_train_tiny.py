"""The command `train-tiny`."""

import sys
from pathlib import Path


def train_tiny(
    output: Path,
    configs: Path,
    finished: Path | None,
    num: int,
    wider: int,
    minutes: float | None,
    show_steps: bool,
    quiet: bool,
) -> int:
    """Run the recipe, or list its steps; returns the exit code."""
    from uniworld.checkpoint.precision import default_device, emulates_bf16
    from uniworld.train.parts.recipe import TRAINED_PARTS, Recipe, recipe, take_finished

    for name in (*TRAINED_PARTS, "stage1", "stage2"):
        if not (configs / f"{name}.yaml").is_file():
            raise FileNotFoundError(f"configs={configs}: has no {name}.yaml")
    steps = recipe(output, configs, num, wider, "fp32" if emulates_bf16(default_device()) else None)

    def note(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    runner = Recipe(output, steps, note)
    if finished is not None:
        if not finished.is_dir():
            raise FileNotFoundError(f"finished={finished}: no such folder")
        runner.count_as_done(taken := take_finished(output, finished))
        note(f"from {finished}: {', '.join(taken) or 'nothing that is not there'}")
    if show_steps:
        done = runner.done
        for step in steps:
            print(f"{'done' if step.name in done else 'to do':6} {step.name:17} {' '.join(step.command)}".rstrip())
        return 0
    code = runner.run(None if minutes is None else 60 * minutes)
    if code:
        note(f"stopped; run again to go on ({', '.join(runner.done) or 'no step'} done)")
        return code
    print(output / "model", flush=True)
    return 0
