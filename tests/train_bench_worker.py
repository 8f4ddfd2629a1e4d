"""The two sides of bench/train_step.py over a few steps: python train_bench_worker.py STAGE, prints what it found."""

import json
import os
import sys
from pathlib import Path

os.environ["UNIWORLD_BENCH_SIZE"] = "tiny"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import torch
import train_step
from full_model import TINY_SIZE, random_uniworld

from uniworld.train import sharding

NUM_STEPS = 3
OVERRIDES = ("optim.lr=1e-3", "optim.warmup_steps=0")  # stage 2's own would move no parameter by a visible amount


def run(stage: str) -> dict:
    config = train_step.train_config(stage, torch.float32, OVERRIDES)
    model = random_uniworld(TINY_SIZE, "cpu", torch.float32, use_t5=False)
    batch = train_step.make_batch(model, config)
    plain = train_step.Plain(model, config, batch, ema_of_frozen=True)
    start = {name: p.detach().clone() for name, p in plain.training.named_parameters()}
    ours = train_step.Ours(model, config, batch)
    losses, agreement = [], {}
    for step in range(NUM_STEPS):
        given = ours.encoded if step == 1 else batch
        losses.append((ours.step(given), plain.step(ema_of_frozen=True)))
        agreement = agreement or train_step.agreement(ours, plain)
    found, expected = ours.state(), plain.state()
    trained = plain.training.trained
    moved = {key: {n: found[key][n] - start[n] for n in trained} for key in ("weights", "ema")}
    truth = {key: {n: expected[key][n].detach() - start[n] for n in trained} for key in ("weights", "ema")}
    frozen = {n: p for n, p in plain.training.named_parameters() if n not in trained}
    return {
        "losses": losses,
        "agreement": agreement,
        "update_error": train_step.distance(moved["weights"], truth["weights"]),
        "ema_error": train_step.distance(moved["ema"], truth["ema"]),
        "frozen_stayed": all(torch.equal(p, start[n]) for n, p in frozen.items()),
        "num_trained": {"ours": ours.trainer.sharded.num_trained, "plain": sum(p.numel() for p in trained.values())},
        "num_averaged": {
            "all": sum(e.numel() for e in plain.training.ema.values()),
            "ours": ours.trainer.ema.flat.numel(),
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1])))
    sharding.exit_process(0)
