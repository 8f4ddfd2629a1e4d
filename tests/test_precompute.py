"""Precomputed states against live encoding on the model tiny: same order, bits and losses; restarts; refusals."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from data_files import data_config, write_authors
from safetensors import safe_open

from uniworld.checkpoint.load import load_denoiser, load_uniworld
from uniworld.checkpoint.tiny import tiny_dir
from uniworld.config import from_dict, to_dict
from uniworld.data.loader import Loader
from uniworld.train import build
from uniworld.train import precompute as room
from uniworld.train.encode import Encoders
from uniworld.train.fingerprint import differences, encoder_fingerprint, settings_fingerprint, weights_digest
from uniworld.train.model import TrainModel
from uniworld.train.precompute import precompute
from uniworld.train.precomputed import Cache, PrecomputedLoader
from uniworld.train.stages import inserts_siglip
from uniworld.train.step import training_loss

STATES = ("vlm_states", "siglip_states", "t5_states", "pooled", "latent_mean", "latent_std", "region_weight")
SIZES = ((64, 64), (96, 64), (64, 96))


def make_config(data, stage="stage2", dtype="fp32", **settings):
    """All kinds of samples: none, one and two references, three ratios."""
    tree = to_dict(data_config(data, **({"num_ratios": 11} | settings)))
    tree |= {"stage": {"preset": stage}, "sharding": {"dtype": dtype}, "model": {"use_t5": dtype == "fp32"}}
    return from_dict(type(data_config(data)), tree)


def cached(config, folder):
    return replace(config, data=replace(config.data, sources=(), precomputed=(str(folder),)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_authors(tmp_path_factory.mktemp("data"), [0, 1, 2, 1, 0, 1, 1], sizes=SIZES)


@pytest.fixture(scope="module")
def parts():
    names = {"fp32": "float32", "bf16": "bfloat16"}
    return {dtype: load_uniworld(dtype=name, progress=False, use_t5=True) for dtype, name in names.items()}


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A cache with everything in it, of two shards and a rest."""
    config = make_config(data, drop_prompt_rate=0.4)
    done = precompute(config, tmp_path_factory.mktemp("cache") / "states", samples_per_shard=3, show_loading=False)
    assert (done.num_shards, done.num_missing, done.num_samples) == (3, 0, 7)
    return config, done.folder


def live_batches(config, parts, **ranks):
    model = parts[config.sharding.dtype]
    use_siglip = inserts_siglip(config.stage)
    encoder = model.semantic_encoder
    loader = Loader(
        config,
        processor=model.processor,
        siglip_preprocess=encoder.preprocess if use_siglip else None,
        siglip_tokens=encoder.num_tokens if use_siglip else 0,
        **ranks,
    )
    encoders = Encoders(model, use_siglip=use_siglip, use_t5=config.model.use_t5)
    return loader, (encoders.encode(batch) for batch in loader)


def loss_of(batch, parts, config, seed=0):
    model = parts[config.sharding.dtype]
    train_model = TrainModel(model.denoiser, model.denoise_projector, model.siglip_projector)
    with torch.no_grad():
        return training_loss(train_model, batch, config.flow, torch.Generator().manual_seed(seed))


def same(a, b):
    return a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


def test_the_empty_prompt_of_the_pooled_state_is_encoded_once(data, parts, monkeypatch):
    encoders = parts["fp32"].text_encoders
    expected, calls = encoders.pooled([""]), []
    monkeypatch.setattr(encoders, "pooled", lambda prompts: calls.append(prompts) or expected)
    _, live = live_batches(make_config(data), parts)
    assert all(torch.equal(next(live).pooled, expected) for _ in range(3))
    assert calls == [[""]]


@pytest.mark.parametrize("stage, dtype", [("stage2", "fp32"), ("stage1", "bf16"), ("stage2", "bf16")])
def test_batches_of_one_are_those_of_live_encoding_bit_by_bit(data, parts, tmp_path, stage, dtype):
    config = make_config(data, stage, dtype, drop_prompt_rate=0.4)
    folder = precompute(config, tmp_path / "states", samples_per_shard=3, show_loading=False).folder
    _, live = live_batches(config, parts)
    stored = PrecomputedLoader(cached(config, folder))
    kinds = set()
    for _ in range(15):  # two epochs and a batch
        a, b = next(live), next(stored).to(torch.device("cpu"), parts[dtype].dtype)
        assert a.sample_ids == b.sample_ids and a.image_ends == b.image_ends
        assert torch.equal(a.attention_mask, b.attention_mask)
        for name in STATES:
            assert same(getattr(a, name), getattr(b, name)), name
        assert torch.equal(loss_of(a, parts, config), loss_of(b, parts, config))
        kinds.add((len(a.image_ends[0]), a.siglip_states is None, a.region_weight is None, a.vlm_states.shape[1]))
    # The data holds every kind: 0, 1 and 2 references; with and without weights; with and without words.
    assert {kind[0] for kind in kinds} == {0, 1, 2}
    assert {kind[2] for kind in kinds} == {True, False}
    assert len(kinds) > 5


def test_bigger_batches_have_the_same_samples_and_nearly_the_same_states(made, parts):
    """Live encoding pads inside the VLM, so that states differ by rounding; the loss does too."""
    config, folder = made
    config = replace(config, data=replace(config.data, batch_size=2, num_ratios=11))
    _, live = live_batches(config, parts)
    stored, padded = PrecomputedLoader(cached(config, folder)), 0
    for _ in range(4):
        a, b = next(live), next(stored)
        assert a.sample_ids == b.sample_ids and a.image_ends == b.image_ends
        assert torch.equal(a.attention_mask, b.attention_mask)
        mask = a.attention_mask.bool()
        padded += int((~mask).sum())
        torch.testing.assert_close(a.vlm_states[mask], b.vlm_states[mask], rtol=1e-4, atol=1e-4)
        assert same(a.region_weight, b.region_weight)
        torch.testing.assert_close(loss_of(a, parts, config), loss_of(b, parts, config), rtol=1e-4, atol=0)
    assert padded


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_position_are_those_of_the_live_loader(made, parts, num_workers):
    config, folder = made
    seen = []
    for rank in range(2):
        live, _ = live_batches(config, parts, rank=rank, world_size=2)
        stored_config = cached(replace(config, data=replace(config.data, num_workers=num_workers)), folder)
        stored = PrecomputedLoader(stored_config, rank=rank, world_size=2)
        ids = [next(live).sample_ids for _ in range(4)]
        assert [next(stored).sample_ids for _ in range(4)] == ids
        state = json.loads(json.dumps(live.state_dict()))
        following = [next(live).sample_ids for _ in range(5)]
        other = PrecomputedLoader(stored_config, rank=rank, world_size=2)
        other.load_state_dict(state)  # taken from the live run
        assert [next(other).sample_ids for _ in range(5)] == following
        stored.load_state_dict(other.state_dict())
        assert [next(stored).sample_ids for _ in range(3)] == [next(live).sample_ids for _ in range(3)]
        stored.close()
        other.close()
        seen.append(ids)
    assert seen[0] != seen[1]


def test_latents_are_drawn_anew_in_each_epoch(made):
    from uniworld.train.encode import draw_latents

    config, folder = made
    batch = next(PrecomputedLoader(cached(config, folder)))
    generator = torch.Generator().manual_seed(0)
    a, b = draw_latents(batch, generator), draw_latents(batch, generator)
    assert not torch.equal(a, b)
    ratio = (a - batch.latent_mean) / batch.latent_std
    assert abs(float(ratio.mean())) < 0.1 and 0.9 < float(ratio.std()) < 1.1


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_next_shard(made, tmp_path, monkeypatch):
    config, whole = made
    folder = tmp_path / "states"

    def stop(done, total):
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        precompute(config, folder, samples_per_shard=3, progress=stop, show_loading=False)
    assert Cache(folder).missing_shards() == [1, 2]
    assert not list(folder.glob(".*"))
    with pytest.raises(FileNotFoundError, match=r"data.precomputed=.*: is not finished, 1 of 3 shards are there"):
        PrecomputedLoader(cached(config, folder))

    encoded, encode = [], room._encode
    monkeypatch.setattr(room, "_encode", lambda p, *rest: (encoded.append(p.number), encode(p, *rest)))
    first = (folder / "shard-000000.safetensors").stat().st_mtime_ns
    done = precompute(config, folder, samples_per_shard=99, show_loading=False)
    assert done.num_missing == 0 and encoded == [3, 4, 5, 6]
    assert (folder / "shard-000000.safetensors").stat().st_mtime_ns == first
    for path in whole.glob("shard-*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_killed_process_leaves_no_half_shard(made, tmp_path):
    """kill -9 while a shard is being written."""
    config, _ = made
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    code = (
        "import os, signal, sys\n"
        "from uniworld.train import precompute as room\n"
        "save = room.save_file\n"
        "def killed(tensors, path, metadata):\n"
        "    save(tensors, path, metadata=metadata)\n"
        "    if 'shard-000001' in str(path):\n"
        "        os.truncate(path, 1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "room.save_file = killed\n"
        "from uniworld import cli\n"
        "cli.main()\n"
    )
    words = ["precompute", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "states"), "--samples-per-shard", "3"]
    killed = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    cache = Cache(tmp_path / "states")
    assert cache.missing_shards() == [1, 2]
    done = subprocess.run(
        [sys.executable, "-m", "uniworld.cli", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "states")
    assert "7 samples" in done.stderr and "data.precomputed=" in done.stderr
    reader = PrecomputedLoader(cached(config, cache.folder)).reader
    assert [reader[((n, 0),)].batch.sample_ids for n in range(7)] == [(f"edits.json:{n}",) for n in range(7)]


def test_processes_share_the_shards(made, tmp_path):
    config, whole = made
    first = precompute(config, tmp_path / "s", samples_per_shard=3, rank=0, world_size=2, show_loading=False)
    assert (first.num_shards, first.num_missing) == (3, 1)
    assert Cache(first.folder).missing_shards() == [1]
    second = precompute(config, tmp_path / "s", samples_per_shard=3, rank=1, world_size=2, show_loading=False)
    assert second.num_missing == 0
    for path in whole.glob("shard-*"):
        assert path.read_bytes() == (second.folder / path.name).read_bytes()


def test_no_encoder_is_loaded(made, monkeypatch):
    config, folder = made

    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(build, "load_uniworld", refuse)
    world = type("W", (), {"rank": 0, "size": 1, "device": torch.device("cpu")})()
    config = replace(cached(config, folder), run_dir=str(folder / "run"))
    parts = build.load_parts(config, world)
    model = build.build_train_model(config, parts)
    batches = build.open_batches(config, parts, world)
    loss = training_loss(model, batches.encode(next(iter(batches.source))), config.flow, torch.Generator())
    assert loss.isfinite()
    held = set(vars(parts))
    assert held == {"folder", "denoiser", "denoise_projector", "siglip_projector", "queries", "device", "dtype"}
    assert parts.queries is None  # this model has none; where it has, they learn and are no encoder
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        build.load_parts(replace(config, validation=replace(config.validation, every_steps=1)), world)


def test_the_denoiser_alone_has_the_weights_of_the_whole(parts):
    alone, whole = load_denoiser(dtype="float32", progress=False), parts["fp32"]
    for name in ("denoiser", "denoise_projector", "siglip_projector"):
        ours, theirs = getattr(alone, name).state_dict(), getattr(whole, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def changed(config, section, **fields):
    return replace(config, **{section: replace(getattr(config, section), **fields)})


@pytest.mark.parametrize(
    "section, fields, says",
    [
        ("data", {"anchor_px": 96 * 96}, "data.anchor_px is 9216, was 4096"),
        ("data", {"region_weight": "sqrt"}, "data.region_weight is sqrt, was log"),
        ("data", {"focus_weight": 2.0}, "data.focus_weight is 2.0, was 1.0"),
        ("data", {"vlm_max_px": 56 * 56}, "data.vlm_max_px is 3136, was 12544"),
        ("sharding", {"dtype": "bf16"}, "sharding.dtype is bf16, was fp32"),
    ],
)
def test_other_settings_are_refused_by_name(made, tmp_path, section, fields, says):
    config, folder = made
    other = changed(config, section, **fields)
    with pytest.raises(ValueError, match=f"data.precomputed=.*: does not fit this config .{says}"):
        PrecomputedLoader(cached(other, folder))
    with pytest.raises(ValueError, match=f"output=.*: does not fit this config .{says}"):
        precompute(other, folder, show_loading=False)


def test_what_a_cache_lacks_is_refused_and_what_it_has_beyond_is_not(data, made, tmp_path):
    config, folder = made
    plain = changed(changed(config, "data", drop_prompt_rate=0.0), "model", use_t5=False)
    stage1 = changed(plain, "stage", preset="stage1")
    batch = next(PrecomputedLoader(cached(stage1, folder)))  # made for stage 2 with T5 and dropped prompts
    assert batch.siglip_states is None and batch.t5_states is None
    small = precompute(stage1, tmp_path / "states", show_loading=False).folder
    with pytest.raises(ValueError, match="it holds no siglip states; it holds no T5 states; it holds no states"):
        PrecomputedLoader(cached(config, small))


def test_other_weights_of_an_encoder_are_refused(made, tmp_path):
    """A copy of tiny passes; one changed value of the VLM does not, one of the DiT does not matter."""
    config, folder = made
    copy = tmp_path / "model"
    shutil.copytree(tiny_dir(), copy)
    config = cached(changed(config, "model", path=str(copy)), folder)
    PrecomputedLoader(config)
    _flip_first_byte(copy, "denoise_tower.denoise_projector.0.weight")
    PrecomputedLoader(config)
    _flip_first_byte(copy, "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=r"does not fit this config \(VLM is another\)"):
        PrecomputedLoader(config)
    path = copy / "flux" / "tokenizer" / "vocab.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"\(VLM is another; CLIP is another\)"):
        PrecomputedLoader(config)


def _flip_first_byte(folder: Path, key: str):
    path = next(p for p in sorted(folder.glob("*.safetensors")) if key in safe_open(p, "pt").keys())  # noqa: SIM118
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = 8 + length + json.loads(data[8 : 8 + length])[key]["data_offsets"][0]
    data[place] ^= 1
    path.write_bytes(data)


def test_the_digest_sees_names_shapes_and_values(tmp_path):
    from safetensors.torch import save_file

    def digest(**tensors):
        save_file(tensors, tmp_path / "w.safetensors")
        return weights_digest([tmp_path / "w.safetensors"])

    big = torch.arange(10_000, dtype=torch.float32)
    last, middle = big.clone(), big.clone()
    last[-1], middle[5_001] = 0, 0
    digests = [digest(a=big), digest(b=big), digest(a=big.view(100, 100)), digest(a=last), digest(a=middle)]
    assert len(set(digests)) == 5
    assert digest(a=big) == digests[0] == digest(a=big.clone())


def test_another_data_list_is_refused(made, tmp_path):
    config, folder = made
    with_sources = replace(cached(config, folder), data=replace(config.data, precomputed=(str(folder),)))
    PrecomputedLoader(with_sources)
    other = make_config(write_authors(tmp_path / "other", [1, 0]))
    with pytest.raises(ValueError, match="the data list is"):
        PrecomputedLoader(replace(with_sources, data=replace(with_sources.data, sources=other.data.sources)))


def test_two_caches_are_read_as_their_sources_would_be(tmp_path, parts):
    first = write_authors(tmp_path / "a", [1, 0, 2, 1, 1], sizes=SIZES)
    second = write_authors(tmp_path / "b", [0, 1, 1, 2, 1, 1, 0], sizes=SIZES)
    broken = tmp_path / "b" / "edits-images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:80])  # the header still gives its size
    configs = [make_config(data, drop_prompt_rate=0.4, max_bad_share=0.5) for data in (first, second)]
    folders = tuple(
        str(precompute(config, tmp_path / name, samples_per_shard=3, show_loading=False).folder)
        for config, name in zip(configs, ("states_a", "states_b"))
    )
    weighted = [replace(config.data.sources[0], weight=w) for config, w in zip(configs, (0.3, 0.7))]
    both = replace(configs[0], data=replace(configs[0].data, sources=tuple(weighted)))
    loader, live = live_batches(both, parts)
    stored = PrecomputedLoader(replace(both, data=replace(both.data, precomputed=folders)))
    for _ in range(24):
        wanted, found = next(live), next(stored)
        assert wanted.sample_ids == found.sample_ids
        assert torch.equal(wanted.vlm_states, found.vlm_states)
    assert loader.bad.state_dict() == stored.bad.state_dict() and loader.bad.count > 0
    with pytest.raises(ValueError, match="states_b.*: does not fit this config .the data list is"):
        PrecomputedLoader(replace(both, data=replace(both.data, precomputed=folders[1:])))


def test_bad_samples_are_counted_as_live(tmp_path, parts):
    data = write_authors(tmp_path, [1, 1, 0, 1, 1, 0, 1, 1], sizes=SIZES)
    broken = tmp_path / "edits-images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:80])  # the header still gives its size
    config = make_config(data, max_bad_share=0.5)
    folder = precompute(config, tmp_path / "states", samples_per_shard=4, show_loading=False).folder
    live, stored = live_batches(config, parts)[0], PrecomputedLoader(cached(config, folder))
    assert [next(live).sample_ids for _ in range(16)] == [next(stored).sample_ids for _ in range(16)]
    assert live.bad.state_dict() == stored.bad.state_dict()
    assert live.bad.count > 0 and "3.png" in live.bad.last[0].path


def test_folder_and_settings_that_cannot_be(made, tmp_path):
    config, folder = made
    with pytest.raises(ValueError, match=r"data.precomputed=.*: must not be set here"):
        precompute(cached(config, folder), tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="output=.*: is not empty and holds no manifest.json"):
        precompute(config, tmp_path / "full", show_loading=False)
    with pytest.raises(FileNotFoundError, match="holds no manifest.json; make it with: uniworld precompute CONFIG -o"):
        PrecomputedLoader(cached(config, tmp_path / "none"))
    assert differences(settings_fingerprint(config), settings_fingerprint(config)) == []
    assert encoder_fingerprint(config).keys() == {"VLM", "VAE", "CLIP", "T5", "SigLIP"}


@pytest.mark.slow
def test_training_from_a_cache_has_the_losses_of_live_training(data, tmp_path):
    pytest.importorskip("deepspeed")
    config = make_config(data, "stage2", drop_prompt_rate=0.3)
    tree = to_dict(config) | {"num_steps": 4, "ema": {"enabled": False}, "checkpoint": {"every_steps": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    folder = precompute(config, tmp_path / "states", show_loading=False).folder
    losses = []
    for name, more in (("live", []), ("cached", [f"data.precomputed={folder}"])):
        run = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", "uniworld.cli", "train", str(tmp_path / "run.yaml"), f"run_dir={run}", *more],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([r[key] for r in records for key in ("step", "loss", "grad_norm")])
    # Batches are encoded together live and one by one in the cache, which rounds otherwise on some CPUs.
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-4)
