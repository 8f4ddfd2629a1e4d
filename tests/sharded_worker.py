"""One rank of the runs that `test_train_sharding` looks at: torchrun sharded_worker.py CASES.json OUTPUT_DIR

A case is {"id", "stage", "sharding", "optim", "poisoned": {step: what}, "without_pictures": [number of a batch]}; rank
0 writes OUTPUT_DIR/results.json and the trained parameters of each case as OUTPUT_DIR/ID.safetensors.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from train_fakes import small_batch, small_config, small_model

from uniworld.train import sharding
from uniworld.train.step import draw

STEPS = 4


def draws(config, number, without_pictures=()):
    """Batch `number` with its draws; numbers go over steps, micro-batches and ranks, so any split sees the same."""
    batch = small_batch(config, number)
    if number in without_pictures:
        batch = replace(batch, siglip_states=None)
    return batch, draw(batch, config.flow, torch.Generator().manual_seed(1000 + number))


def poison(loss, what):
    """A loss that is not finite while its gradient is ("inf"), the reverse ("gradient"), or both ("nan")."""
    if what == "gradient":
        return Overflowing.apply(loss)
    return loss + torch.inf if what == "inf" else loss * torch.nan


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def run(case, world):
    config = small_config(case["stage"], sharding=case["sharding"], optim=case.get("optim", {}))
    model = small_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharded = sharding.Sharded(model, config, world)
    accumulated, poisoned = config.sharding.accumulation_steps, case.get("poisoned", {})
    result = {"losses": [], "grad_norms": [], "skipped": [], "changed": []}
    for step in range(STEPS):
        masters = [s.tensor.clone() for s in sharded.slices()]
        total = 0.0
        for micro in range(accumulated):
            number = (step * accumulated + micro) * world.size + world.rank
            batch, drawn = draws(config, number, case.get("without_pictures", ()))
            batch = batch.to(world.device, sharded.dtype)
            loss = sharded(batch, drawn.latents, drawn.noise, drawn.sigma)
            if str(step) in poisoned and world.rank == world.size - 1 and micro == 0:
                loss = poison(loss, poisoned[str(step)])
            total += loss.item() / accumulated
            report = sharded.backward_and_step(loss)
            assert (report is None) == (micro + 1 < accumulated)
        changed = any(not torch.equal(a, s.tensor) for a, s in zip(masters, sharded.slices()))
        result["losses"].append(world.total([total])[0] / world.size)
        result["grad_norms"].append(report.grad_norm)
        result["skipped"].append(world.total([report.skipped])[0])
        result["changed"].append(world.total([changed])[0])
    return result | look(sharded, before), whole(sharded)


def look(sharded, before):
    """Facts about the parameters after training."""
    world, zero3 = sharded.world, sharded.zero_stage == 3
    parameters = dict(sharded.model.named_parameters())
    facts = {
        "num_trained": sharded.num_trained,
        "gradients_of_frozen": [n for n, p in parameters.items() if not p.requires_grad and p.grad is not None],
        "offloads": getattr(sharded.engine.optimizer, "cpu_offload", False),
        "partitioned": all(p.numel() == 0 for p in parameters.values()),
        "own_numel": sum(s.numel for s in sharded.slices()),
    }
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero3):
        values = {n: p.detach().clone() for n, p in parameters.items()}
    same = {n: torch.equal(values[n], before[n].to(sharded.dtype)) for n in values}
    facts["changed_frozen"] = [n for n, p in parameters.items() if not p.requires_grad and not same[n]]
    facts["unchanged_trained"] = [n for n, p in parameters.items() if p.requires_grad and same[n]]
    pieces = sharded.slices("params")
    kept = [s.tensor.clone() for s in pieces]
    sharded.write_params([torch.full_like(s.tensor, 0.5) for s in pieces], dtype=sharded.dtype)
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero3):
        facts["written"] = all(bool((parameters[n] == 0.5).all()) for n in sharded.names)
    sharded.write_params(kept, dtype=sharded.dtype)
    for name, full in sharded.gather([s.tensor for s in sharded.slices("params")], dtype=sharded.dtype, to_all=True):
        assert torch.equal(full, values[name]), name
    facts["own_numel"] = world.total([facts["own_numel"]])[0]
    return facts


def whole(sharded):
    tensors = sharded.gather([s.tensor for s in sharded.slices()])
    return {name: t.clone() for name, t in tensors if t is not None}


def main(cases, output):
    sharding.PERSISTENT_NUMEL = 0  # ZeRO 3 keeps nothing whole, as with parameters of full size
    world = sharding.init()
    results = {}
    for case in cases:
        results[case["id"]], parameters = run(case, world)
        if world.rank == 0:
            save_file(parameters, output / f"{case['id']}.safetensors")
    if world.rank == 0:
        (output / "results.json").write_text(json.dumps(results))
    sharding.exit_process(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
