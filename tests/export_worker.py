"""One rank of `test_export.py`: trains each case some steps on random pictures, saves, and writes what it holds.

    torchrun ... export_worker.py CASES_AS_JSON FOLDER

A case is {"id", "config"}; its run folder is FOLDER/ID, and FOLDER/ID.pt holds master weights, parameters and EMA.
"""

import json
import sys
from pathlib import Path

import torch
from train_fakes import open_random_pictures

from uniworld.config import TrainConfig, from_dict
from uniworld.train import build, sharding
from uniworld.train.ema import ShardedEMA
from uniworld.train.resume import Checkpointer
from uniworld.train.sharding import Sharded
from uniworld.train.step import rank_generator, training_loss

STEPS = 3


def run(case, folder, world):
    config = from_dict(TrainConfig, case["config"] | {"run_dir": str(folder / case["id"])})
    parts = build.load_parts(config, world)
    sharded = Sharded(build.build_train_model(config, parts), config, world)
    batches = open_random_pictures(config, parts, world)
    ema = ShardedEMA(sharded, config.ema) if config.ema.enabled else None
    generator = rank_generator(0, world.rank)
    for _ in range(STEPS):
        encoded = batches.encode(next(batches.source))
        sharded.backward_and_step(training_loss(sharded, encoded, config.flow, generator))
        if ema is not None:
            ema.update()
    Checkpointer(config, sharded, ema).save(STEPS, {})
    held = {"master": dict(sharded.gather([s.tensor for s in sharded.slices()]))}
    held["params"] = dict(sharded.gather([s.tensor for s in sharded.slices("params")], dtype=sharded.dtype))
    held["ema"] = {} if ema is None else dict(sharded.gather([s.tensor for s in ema.slices()]))
    if world.rank == 0:
        torch.save(held, folder / f"{case['id']}.pt")


def main(cases, folder):
    world = sharding.init()
    for case in json.loads(cases):
        run(case, Path(folder), world)
    sharding.exit_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
