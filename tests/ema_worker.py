"""One rank of `test_train_ema.py`: trains each case a few steps and writes what the average did.

torchrun ... ema_worker.py CASES_AS_JSON FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from train_fakes import small_batch, small_config, small_model

from uniworld.train import ema as ema_module
from uniworld.train import sharding
from uniworld.train.ema import ShardedEMA
from uniworld.train.sharding import Sharded
from uniworld.train.step import rank_generator, training_loss

STEPS = 5
COLLECTIVES = ("all_reduce", "broadcast", "all_gather_object", "all_gather_into_tensor", "send", "recv", "barrier")


class Counted:
    """Counts calls of functions of a module while entered."""

    def __init__(self, module, names):
        self.module, self.calls = module, 0
        self.originals = {name: getattr(module, name) for name in names if hasattr(module, name)}

    def __enter__(self):
        for name, original in self.originals.items():
            setattr(self.module, name, self.counting(original))
        return self

    def counting(self, original):
        def call(*arguments, **options):
            self.calls += 1
            return original(*arguments, **options)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(self.module, name, original)


def whole(sharded, tensors, dtype):
    return {n: t.clone() for n, t in sharded.gather(tensors, dtype=dtype, to_all=True)}


def run(case, world):
    zero_stage, dtype, source = case
    config = small_config(
        "stage2",
        sharding={"zero_stage": zero_stage, "dtype": dtype},
        ema={"decay": 0.9, "source": source},
        optim={"lr": 3e-4},
    )
    sharded = Sharded(small_model(config), config, world)
    ema = ShardedEMA(sharded, config.ema)
    generator = rank_generator(0, world.rank)
    source_dtype = torch.float32 if source == "master" else sharded.dtype

    def sources():
        return whole(sharded, [s.tensor for s in sharded.slices(source)], source_dtype)

    result = {"sources": [sources()]}
    for step in range(STEPS):
        batch = small_batch(config, 2 * step + world.rank, sharded.dtype)
        report = sharded.backward_and_step(training_loss(sharded, batch, config.flow, generator))
        assert not report.skipped
        with Counted(dist, COLLECTIVES) as collectives, Counted(ema_module, ["ema_update"]) as launches:
            ema.update()
        result["sources"].append(sources())
    pieces = [s.tensor for s in ema.slices()]
    result |= {
        "collectives": collectives.calls,
        "launches": launches.calls,
        "num_trained": sharded.num_trained,
        "num_bytes": ema.num_bytes,
        "num_runs": len(ema._averages),
        "numel": sum(p.numel() for p in pieces),
        "ema": whole(sharded, pieces, torch.float32),
    }
    return result | swapped(sharded, ema, config)


def swapped(sharded, ema, config):
    """What the model computes before, with and after the average."""

    @torch.no_grad()
    def loss():
        batch = small_batch(config, 99, sharded.dtype)
        return training_loss(sharded, batch, config.flow, rank_generator(9, 0)).item()

    before, loss_before = [s.tensor.clone() for s in sharded.slices("params")], loss()
    masters = [s.tensor.clone() for s in sharded.slices("master")]
    with ema.swapped_in():
        loss_inside = loss()
        pairs = zip(ema.slices(), sharded.slices("params"))
        equal = all(torch.equal(average.tensor.to(sharded.dtype), p.tensor) for average, p in pairs)
    loss_after = loss()
    restored = all(torch.equal(a, s.tensor) for a, s in zip(before, sharded.slices("params")))
    restored &= all(torch.equal(a, s.tensor) for a, s in zip(masters, sharded.slices("master")))
    return {
        "loss_before": loss_before,
        "loss_inside": loss_inside,
        "loss_after": loss_after,
        "swapped_equals_average": equal,
        "restored": restored,
    }


def main(cases, folder):
    world = sharding.init()
    for number, case in enumerate(json.loads(cases)):
        torch.save(run(case, world), Path(folder) / f"{number}-{world.rank}.pt")
    sharding.exit_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
