"""Models from training checkpoints of every ZeRO stage and several numbers of ranks: keys, weights, loading, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import checkpoint_keys, flux_dir, siglip_dir, univa_dir
from safetensors.torch import load_file

from uniworld import cli
from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.names import authors_names
from uniworld.train.checkpoints import checkpoints_dir, open_checkpoint
from uniworld.train.export import export

pytest.importorskip("deepspeed")

WORKER = Path(__file__).parent / "export_worker.py"
PARTS = ("denoise_projector", "siglip_projector")


def case(name, stage, model, **sections):
    sharding = {"dtype": "fp32"} | sections.pop("sharding", {})
    config = {"stage": {"preset": stage}, "model": model, "sharding": sharding, **sections}
    return {"id": name, "config": {"data": {"anchor_px": 64 * 64}, "optim": {"lr": 1e-2}, **config}}


def train(folder, ranks, cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(WORKER), json.dumps(cases), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The golden checkpoint and the folders that it needs."""
    tmp = tmp_path_factory.mktemp("base")
    return {"path": str(univa_dir(tmp)), "flux": str(flux_dir(tmp)), "siglip": str(siglip_dir(tmp))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("trained")
    two = [case(f"zero{z}", "stage2", base, sharding={"zero_stage": z}) for z in (1, 2, 3)]
    accumulated = {"zero_stage": 1, "dtype": "bf16", "accumulation_steps": 2}  # another optimizer of DeepSpeed's
    two.append(case("accumulated", "stage2", base, sharding=accumulated))
    two.append(case("tiny", "stage1", {"path": "tiny"}, sharding={"zero_stage": 3, "dtype": "bf16"}))
    train(folder, 2, two)
    train(folder, 1, [case("alone", "stage1", base, ema={"enabled": False})])
    return folder


def held(trained, name, kind):
    return torch.load(trained / f"{name}.pt")[kind]


def expected_keys(weights):
    """The authors' key -> rows of the trained parameter."""
    found = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        keys = authors_names(part, rest)
        found |= dict(zip(keys, tensor.chunk(len(keys))))
    return found


@pytest.mark.parametrize("kind", ["master", "ema"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "accumulated"])
def test_trained_weights_replace_those_of_the_base(trained, base, tmp_path, name, kind):
    done = export(trained / name, tmp_path / "out", ema=kind == "ema", progress=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tuple(t.shape) for key, t in weights.items()} == checkpoint_keys()
    start, wanted = load_file(Path(base["path"]) / "model.safetensors"), expected_keys(held(trained, name, kind))
    changed = 0
    for key, tensor in weights.items():
        if key in wanted:
            assert torch.equal(tensor, wanted[key]), key
            changed += not torch.equal(tensor, start[key])
        else:
            assert torch.equal(tensor, start[key]), key
    assert changed > 0.8 * len(wanted) > 20
    assert done.step == 3 and len(done.names) == len(held(trained, name, kind))
    different = held(trained, name, "ema" if kind == "master" else "master")
    assert any(not torch.equal(t, wanted[key]) for key, t in expected_keys(different).items())


def test_the_loader_takes_it_and_holds_what_was_trained(trained, base, tmp_path):
    export(trained / "zero2", tmp_path / "out", progress=False)
    parts = {"flux": base["flux"], "siglip": base["siglip"]}
    model = load_uniworld(tmp_path / "out", **parts, device="cpu", dtype="float32", progress=False)
    for name, tensor in held(trained, "zero2", "params").items():
        part, _, rest = name.partition(".")
        assert torch.equal(getattr(model, part).get_parameter(rest), tensor), name
    assert model.task_head is not None
    for file in ("tokenizer.json", "preprocessor_config.json", "config.json"):
        assert (tmp_path / "out" / file).is_file()


def test_shards_and_index(trained, tmp_path):
    export(trained / "zero1", tmp_path / "whole", progress=False)
    export(trained / "zero1", tmp_path / "sharded", progress=False, max_shard_bytes=500_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(checkpoint_keys()) and len(set(index.values())) > 3
    together = {}
    for shard in set(index.values()):
        together |= load_file(tmp_path / "sharded" / shard)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == together.keys() and all(torch.equal(whole[k], together[k]) for k in whole)


@pytest.mark.parametrize("connectors_only", [False, True])
def test_connectors_alone(trained, base, tmp_path, connectors_only):
    """Under the authors' names, for their loader and as the start of our next stage."""
    out = tmp_path / "out"
    export(trained / "zero3", out, ema=True, connectors_only=connectors_only, progress=False)
    wanted = held(trained, "zero3", "ema")
    keys = {k for k in checkpoint_keys() if k.startswith(tuple(f"denoise_tower.{p}." for p in PARTS))}
    seen = set()
    for part in PARTS:
        tensors, same = torch.load(out / f"{part}.bin", weights_only=True), load_file(out / f"{part}.safetensors")
        assert tensors.keys() == same.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, wanted[key.removeprefix("denoise_tower.")]) and torch.equal(tensor, same[key])
        seen |= set(tensors)
    assert seen == keys and len(keys) == 8
    assert (out / "model.safetensors").exists() != connectors_only
    model = load_uniworld(
        base["path"], base["flux"], base["siglip"], device="cpu", dtype="float32", connectors=out, progress=False
    )
    assert torch.equal(model.siglip_projector[2].weight, wanted["siglip_projector.2.weight"])


def test_a_stage_that_started_from_connectors_keeps_them(trained, base, tmp_path):
    """Stage 1 left a connector that the next run does not train: it must not fall back to the base's."""
    export(trained / "zero3", tmp_path / "earlier", connectors_only=True, progress=False)
    model = base | {"connectors": str(tmp_path / "earlier")}
    train(tmp_path, 1, [case("next", "siglip_mlp", model)])
    export(tmp_path / "next", tmp_path / "out", progress=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    earlier = held(trained, "zero3", "master")["denoise_projector.0.weight"]
    assert torch.equal(weights["denoise_tower.denoise_projector.0.weight"], earlier)
    mine = torch.load(tmp_path / "next.pt")["master"]["siglip_projector.0.weight"]
    assert torch.equal(weights["denoise_tower.siglip_projector.0.weight"], mine)
    assert not (tmp_path / "out" / "denoise_projector.bin").exists()


def test_tiny_comes_with_flux_and_siglip_and_draws(trained, tmp_path):
    from uniworld.engine import Engine

    done = export(trained / "tiny", tmp_path / "out", progress=False)
    assert done.parts == {}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["uniworld"]["random_weights"] is False
    engine = Engine.from_pretrained(tmp_path / "out", progress=False, dtype="float32")
    assert not engine.model.random_weights
    params = held(trained, "tiny", "params")
    assert params["denoise_projector.0.weight"].dtype == torch.bfloat16
    for name, tensor in params.items():
        part, _, rest = name.partition(".")
        assert torch.equal(getattr(engine.model, part).get_parameter(rest), tensor.float())
    small = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}
    assert engine.generate("a cat", **small).images[0].size == (64, 64)


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["uniworld", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_command(trained, base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    code, stdout, stderr = run_command(monkeypatch, capsys, "export", trained / "zero1", "-o", out, "--ema")
    assert (code, stdout) == (0, f"{out}\n")
    assert f"use it with --model {out} --flux {base['flux']} --siglip {base['siglip']}" in stderr
    exported = load_file(out / "model.safetensors")
    wanted = expected_keys(held(trained, "zero1", "ema"))
    assert all(torch.equal(exported[key], tensor) for key, tensor in wanted.items())
    code, stdout, stderr = run_command(monkeypatch, capsys, "export", trained / "zero1", "-o", out)
    assert code == 2 and stderr.startswith("error: out=") and "exists already" in stderr and stderr.count("\n") == 1
    quiet = ("--connectors-only", "--overwrite", "-q")
    assert run_command(monkeypatch, capsys, "export", trained / "zero1", "-o", out, *quiet) == (0, f"{out}\n", "")
    assert sorted(p.name for p in out.iterdir()) == [f"{p}.{s}" for p in PARTS for s in ("bin", "safetensors")]


def test_a_command_beside_an_imported_trainer_does_not_end_the_process():
    """Only a process of a process group is ended abruptly: not this one, which runs other tests too."""
    code = "import sys, uniworld.train.sharding, uniworld.cli as cli\nsys.argv = ['uniworld', '--version']\n"
    code += "try:\n    cli.main()\nfinally:\n    print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.endswith("still here\n"), done.stderr


@pytest.mark.parametrize("spoil", ["ema", "truncated", "missing", "other base"])
def test_errors_name_what_is_wrong_and_leave_nothing(trained, tmp_path, spoil, base):
    name = "alone" if spoil == "ema" else "zero2"
    run = tmp_path / "run"
    shutil.copytree(trained / name, run)
    folder = open_checkpoint(run).folder
    match spoil:
        case "ema":
            message, ema = "was saved without EMA", True
        case "truncated":
            message, ema = "is no complete checkpoint: ema/rank-00001.safetensors has 10 bytes", True
            os.truncate(folder / "ema" / "rank-00001.safetensors", 10)
        case "missing":
            message, ema = "holds no complete checkpoint", False
            shutil.rmtree(folder)
            checkpoints_dir(run).mkdir(exist_ok=True)
        case "other base":
            message, ema = "has no denoise_tower|has shape|has no .*, which was trained", False
            config = (folder / "config.yaml").read_text().replace(base["path"], "tiny")
            (folder / "config.yaml").write_text(config)
            manifest = json.loads((folder / "checkpoint.json").read_text())
            manifest["files"]["config.yaml"] = len(config)
            (folder / "checkpoint.json").write_text(json.dumps(manifest))
    target = folder if spoil == "truncated" else run
    with pytest.raises(ValueError, match=message):
        export(target, tmp_path / "out", ema=ema, progress=False)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
