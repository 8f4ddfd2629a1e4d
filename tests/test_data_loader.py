"""The loader: order, resume, equal cost over ranks, bad samples, dropped captions."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import caption, data_config, edited, picture, turns, write_authors
from golden import ROOT

from uniworld.data.bad import TooManyBadSamples
from uniworld.data.loader import Loader
from uniworld.data.plan import forward_flops
from uniworld.data.reader import Loaded
from uniworld.models.prompts import PromptProcessor, training_pieces
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor, smart_resize


@pytest.fixture(scope="module")
def processor():
    preprocessor = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())
    return PromptProcessor(load_tokenizer(ROOT / "univa", "Qwen2Tokenizer"), VisionProcessor(preprocessor))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mixed(tmp_path):
    """24 samples: text to image, one reference, two references, one reference."""
    return write_authors(tmp_path / "mixed", [0, 1, 2, 1] * 6)


def same(a, b):
    tensors = (
        (a.inputs.input_ids, b.inputs.input_ids),
        (a.inputs.attention_mask, b.inputs.attention_mask),
        (a.inputs.pixel_values, b.inputs.pixel_values),
        (a.target, b.target),
        (a.region_weight, b.region_weight),
    )
    equal = all((x is None and y is None) or torch.equal(x, y) for x, y in tensors)
    return equal and a.sample_ids == b.sample_ids and a.instructions == b.instructions


def ids(loader, num_steps):
    return [next(loader).sample_ids for _ in range(num_steps)]


# Order and position


def test_order_does_not_depend_on_workers(mixed, processor):
    plain = Loader(data_config(mixed, batch_size=2), processor=processor)
    expected = [next(plain) for _ in range(20)]
    for num_workers in (1, 2):
        loader = Loader(data_config(mixed, batch_size=2, num_workers=num_workers), processor=processor)
        assert all(same(next(loader), batch) for batch in expected)
        loader.close()
    other = Loader(data_config(mixed, batch_size=2, seed=1), processor=processor)
    assert ids(other, 20) != [batch.sample_ids for batch in expected]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_goes_on_after_the_last_batch_handed_out(mixed, processor, num_workers, rank):
    config = data_config(mixed, num_workers=num_workers, drop_prompt_rate=0.3)

    def loader():
        return Loader(config, processor=processor, rank=rank, world_size=2)

    first = loader()
    states, batches = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(first.state_dict())))
        batches.append(next(first))
    first.close()
    for cut in (0, 7, 12, 23):
        resumed = loader()
        resumed.load_state_dict(states[cut])
        assert all(same(next(resumed), batch) for batch in batches[cut : cut + 5])
        resumed.close()
    rewound = loader()
    ids(rewound, 3)
    rewound.load_state_dict(states[7])  # also of a loader that already runs
    assert same(next(rewound), batches[7])
    rewound.close()
    assert len(json.dumps(states[-1])) < 2000


def test_reading_leaves_the_global_generator_alone(mixed, processor):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ids(Loader(data_config(mixed, drop_prompt_rate=0.5), processor=processor), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_every_sample_once(mixed, processor):
    everything = sorted(f"edits.json:{i}" for i in range(24))
    alone = Loader(data_config(mixed), processor=processor)
    for epoch in range(2):
        assert alone.epoch == epoch
        assert sorted(i for one in ids(alone, alone.num_steps_per_epoch) for i in one) == everything
    pair = [Loader(data_config(mixed), processor=processor, rank=r, world_size=2) for r in (0, 1)]
    seen = [i for loader in pair for one in ids(loader, loader.num_steps_per_epoch) for i in one]
    waiting = {f"edits.json:{number}" for number, _ in pair[0].state_dict()["carried"]}
    assert len(set(seen)) == len(seen)
    assert sorted({*seen, *waiting}) == everything and len(seen) + len(waiting) == 24


def test_other_ranks_or_data_go_on_at_the_same_share(mixed, processor, caplog):
    two = Loader(data_config(mixed), processor=processor, rank=1, world_size=2)
    ids(two, 6)
    one = Loader(data_config(mixed), processor=processor)
    one.load_state_dict(two.state_dict())
    share = 6 / two.num_steps_per_epoch
    assert f"changed since the checkpoint: epoch 0 goes on at {100 * share:.0f} %" in caplog.text
    assert one.state_dict()["step"] == int(24 * share)
    ids(one, 24 - int(24 * share))
    assert one.epoch == 1


def test_mixed_shapes(tmp_path, processor):
    """Batches share a target size; a picture's weight map has its latent size."""
    sizes = ((640, 480), (480, 640), (512, 512))
    data = write_authors(tmp_path / "shapes", [1] * 12, sizes=sizes)
    loader = Loader(data_config(data, num_ratios=11, anchor_px=128 * 128, batch_size=2), processor=processor)
    shapes = set()
    for _ in range(loader.num_steps_per_epoch):
        batch = next(loader)
        H, W = batch.target.shape[2:]
        shapes.add((H, W))
        assert batch.region_weight.shape == (2, 1, H // 8, W // 8) and len(batch) == 2
        assert batch.region_weight.amin() == 1 and (batch.region_weight.amax((1, 2, 3)) > 2).all()
        assert batch.inputs.attention_mask[:, -1].all()  # padding is on the left
    assert shapes == {(96, 128), (128, 96), (128, 128)}


def test_weights_only_where_wanted(tmp_path, processor):
    data = write_authors(tmp_path / "plain", [1] * 4, need_weight=False)
    assert next(Loader(data_config(data, batch_size=4), processor=processor)).region_weight is None
    data = write_authors(tmp_path / "weighted", [1] * 4)
    assert next(Loader(data_config(data, region_weight="none"), processor=processor)).region_weight is None
    linear = next(Loader(data_config(data, region_weight="linear"), processor=processor)).region_weight
    assert linear.max() == pytest.approx(4.0)  # a quarter is edited


def test_what_a_sample_focuses_on_counts_at_least_so_much(tmp_path, processor):
    """The region's own weight where it is greater; text to image too; nothing without `focus_weight`."""
    edits = write_authors(tmp_path / "edits", [1] * 4, focus=[[0.5, 0.75, 1, 1]])
    plain = next(Loader(data_config(edits, batch_size=4), processor=processor)).region_weight
    focused = next(Loader(data_config(edits, batch_size=4, focus_weight=2.5), processor=processor)).region_weight
    in_box = torch.zeros(plain.shape[2:], dtype=torch.bool)
    in_box[6:, 4:] = True  # the region is above
    assert torch.equal(focused, torch.where(in_box, plain.clamp(min=2.5), plain)) and not torch.equal(focused, plain)
    drawn = write_authors(tmp_path / "drawn", [0] * 4, focus=[[0.5, 0.75, 1, 1]])
    weight = next(Loader(data_config(drawn, batch_size=4, focus_weight=2.5), processor=processor)).region_weight
    assert torch.equal(weight, torch.where(in_box, 2.5, 1.0).expand_as(weight))
    assert next(Loader(data_config(drawn, batch_size=4), processor=processor)).region_weight is None


def test_a_focus_is_cut_as_its_picture_is(tmp_path, processor):
    """Of a picture twice as wide as it is high the left and the right quarter are cut off."""
    data = write_authors(tmp_path / "wide", [0], sizes=((128, 64),), focus=[[0, 0, 0.5, 1]])
    fits = {"num_ratios": 1, "focus_weight": 3.0}
    stretched = next(Loader(data_config(data, **fits), processor=processor)).region_weight[0, 0]
    assert stretched.shape[0] == stretched.shape[1] and stretched.mean(0).tolist() == [3, 3, 3, 3, 1, 1, 1, 1]
    data = write_authors(tmp_path / "left", [0], sizes=((128, 64),), focus=[[0, 0, 0.375, 1]])
    cut = next(Loader(data_config(data, target_fit="crop", **fits), processor=processor)).region_weight[0, 0]
    assert cut.mean(0).tolist() == [3, 3, 1, 1, 1, 1, 1, 1]  # 0.375 of the whole is a quarter of the middle half


# Equal cost over ranks


class ExactTokens:
    """Stands for the reader: what the DiT would attend to, counted from prompts and picture sizes."""

    def __init__(self, loader):
        self.loader, self.dataset, self.processor = loader, loader.dataset, loader.reader.collator.processor

    def __getitem__(self, items):
        (number, _), *others = items
        assert not others
        sample, vision = self.dataset[number], self.processor.vision
        height, width = self.loader.reader.bucket_sizes[self.loader.reader.buckets[number]]
        tokens = height * width // 256 + len(self.processor.tokenize(training_pieces(sample.conversations)))
        for reference in sample.references:
            rows, columns = smart_resize(*reference.size(), vision.factor, vision.min_pixels, vision.max_pixels)
            tokens += rows * columns // 784 - 1 + 1024
        return Loaded((tokens, number), {}, [])


class Counting(Loader):
    """A loader that counts tokens where another decodes pictures."""

    def _start(self):
        reader = ExactTokens(self)
        plan = self._plan(0)
        return iter([reader[tuple(map(tuple, plan.items[step, self.rank].tolist()))] for step in range(1000)])


def write_mixed(folder, n):
    """`n` samples over a few pictures: 0, 1 or 2 references, five ratios, captions of 5 to 200 words."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    sizes = [(512, 512), (640, 480), (480, 640), (768, 432), (600, 400)]
    for i, size in enumerate(sizes):
        picture(rng, *size).save(folder / "images" / f"{i}.jpg")
    records = []
    for _ in range(n):
        num_references = int(rng.choice([0, 1, 2], p=[0.3, 0.6, 0.1]))
        names = [f"{i}.jpg" for i in rng.integers(0, len(sizes), num_references + 1)]
        num_words = int(rng.integers(5, 200 if num_references == 0 else 40))
        records.append({"image": names, "conversations": turns(caption(rng, num_words), num_references)})
    (folder / "mixed.json").write_text(json.dumps(records))
    (folder / "data.txt").write_text("images,mixed.json,true\n")
    return folder / "data.txt"


def test_ranks_get_equal_cost(tmp_path, processor, record_property):
    data = write_mixed(tmp_path / "many", 8400)
    config = data_config(data, num_ratios=11, anchor_px=512 * 512, vlm_max_px=448 * 448)
    loaders = [
        Counting(config, processor=processor, siglip_preprocess=len, rank=rank, world_size=8) for rank in range(8)
    ]
    steps = [[next(loader) for loader in loaders] for _ in range(1000)]
    costs = forward_flops(np.array([[tokens for tokens, _ in step] for step in steps], float))
    ratio = costs.max(1) / costs.mean(1)
    record_property("max_over_mean", float(ratio.max()))
    assert ratio.max() <= 1.1
    assert costs.max() > 3 * costs.min()  # the mixture is a hard one
    numbers = [number for step in steps for _, number in step]
    assert len(set(numbers)) == 8000
    left_out = 8400 - 8 * loaders[0].num_steps_per_epoch
    assert left_out <= 7 * 10  # under one step a cluster of costs: they wait for the next epoch


def test_counted_tokens_are_those_of_the_batch(tmp_path, processor):
    """The count above, and the estimate behind the plan, against a batch as the trainer gets it."""
    data = write_mixed(tmp_path / "some", 40)
    config = data_config(data, num_ratios=11, anchor_px=128 * 128, vlm_max_px=448 * 448)
    loader = Loader(config, processor=processor, siglip_preprocess=lambda images: torch.zeros(len(images), 3, 4, 4))
    counted = ExactTokens(loader)
    for number in range(0, 40, 7):
        batch = loader.reader[((number, 0),)].batch
        exact = batch.num_tokens(siglip_tokens=1024)
        assert exact == counted[((number, 0),)].batch[0]
        assert loader.planner.costs[number] == pytest.approx(forward_flops(exact), rel=0.1)


# Bad samples


def spoil(folder, number, how):
    image = folder / "edits-images" / f"{number}.png"
    if how == "missing":
        image.unlink()
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
    elif how == "unchanged but for a dot":
        from PIL import Image

        reference = Image.open(folder / "edits-images" / f"{number}-0.png").resize((256, 256))
        reference.save(folder / "edits-images" / f"{number}-0.png")
        edited(reference, 0.0002).save(image)


BAD = {"missing": "no such file", "truncated": "broken image file", "unchanged but for a dot": "edited share"}


@pytest.mark.parametrize("how, reason", BAD.items())
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_skipped_counted_and_logged(tmp_path, processor, caplog, how, reason, num_workers):
    data = write_authors(tmp_path / "set", [1] * 8)
    spoil(tmp_path / "set", 3, how)
    log = tmp_path / "run" / "bad.jsonl"
    config = data_config(data, num_workers=num_workers, max_bad_share=0.2, anchor_px=256 * 256)
    loader = Loader(config, processor=processor, bad_log=log)
    seen = [i for batch in ids(loader, 7) for i in batch]
    assert sorted(seen) == [f"edits.json:{i}" for i in range(8) if i != 3]
    if how != "missing":  # that is known before the epoch is planned
        assert loader.bad.count == 1
    assert loader.bad.count + loader.bad.num_unusable.total() == 1
    path = str(tmp_path / "set" / "edits-images" / "3.png")
    (bad,) = loader.bad.last
    assert (bad.id, bad.path) == ("edits.json:3", path) and reason in bad.reason
    assert path in caplog.text and reason in caplog.text
    assert json.loads(log.read_text())["path"] == path
    loader.close()


def test_a_batch_goes_on_without_its_bad_sample(tmp_path, processor):
    data = write_authors(tmp_path / "set", [1] * 6)
    spoil(tmp_path / "set", 2, "truncated")
    loader = Loader(data_config(data, batch_size=3), processor=processor)
    sizes = [len(next(loader)) for _ in range(2)]
    assert sorted(sizes) == [2, 3] and loader.bad.count == 1 and loader.bad.total_read == 6


def test_bad_samples_do_not_upset_the_other_ranks(tmp_path, processor):
    """Text to image and edits alternate at random; after a bad sample the ranks still meet at equal cost."""
    data = write_authors(tmp_path / "set", [0, 2] * 24, num_words=6)
    for number in (4, 7, 20, 21, 33):
        spoil(tmp_path / "set", number, "truncated")
    config = data_config(data, max_bad_share=0.9)
    loaders = [Loader(config, processor=processor, rank=rank, world_size=2) for rank in range(2)]
    num_steps = loaders[0].num_steps_per_epoch
    seen, states, batches = [[], []], [], []
    for step in range(3 * num_steps):
        one, two = (next(loader) for loader in loaders)
        assert (one.inputs.pixel_values is None) == (two.inputs.pixel_values is None), step
        seen[0] += one.sample_ids
        seen[1] += two.sample_ids
        states.append(json.loads(json.dumps(loaders[0].state_dict())))
        batches.append(one)
    bad = {f"edits.json:{number}" for number in (4, 7, 20, 21, 33)}
    everything = seen[0] + seen[1]
    counts = {i: everything.count(i) for i in {f"edits.json:{number}" for number in range(48)} - bad}
    assert not bad & set(everything)
    # three epochs of each, and a few of the fourth in the places of the bad ones
    assert all(3 <= count <= 4 for count in counts.values())
    assert sum(count == 4 for count in counts.values()) == 3 * len(bad)
    first_epoch = [i for one in seen for i in one[:num_steps]]
    assert set(counts) <= set(first_epoch)
    assert {bad_sample.id for loader in loaders for bad_sample in loader.bad.last} == bad

    config = data_config(data, max_bad_share=0.9, num_workers=2)
    resumed = Loader(config, processor=processor, rank=0, world_size=2)
    cut = num_steps - 3
    resumed.load_state_dict(states[cut])
    for batch in batches[cut + 1 : cut + 1 + num_steps]:
        assert same(next(resumed), batch)
    assert dict(resumed.bad.num_bad) == states[cut + num_steps]["bad"]["num_bad"]
    resumed.close()


def test_too_many_bad_samples_stop_the_run(tmp_path, processor):
    data = write_authors(tmp_path / "set", [1] * 40)
    for number in range(12):
        spoil(tmp_path / "set", number, "truncated")
    loader = Loader(data_config(data), processor=processor)
    with pytest.raises(TooManyBadSamples, match="data.max_bad_share=0.01: 11 of") as error:
        ids(loader, 200)
    assert "edits.json " in error.value.table and "broken image file" in error.value.table
    assert str(tmp_path / "set" / "edits-images") in error.value.table


def test_too_many_missing_files_stop_the_run_before_it_starts(tmp_path, processor):
    data = write_authors(tmp_path / "set", [1] * 10)
    spoil(tmp_path / "set", 0, "missing")
    with pytest.raises(TooManyBadSamples, match="1 of 10 samples cannot be used"):
        Loader(data_config(data), processor=processor)
    Loader(data_config(data, max_bad_share=0.1), processor=processor)


def test_a_mended_file_is_used_again(tmp_path, processor):
    data = write_authors(tmp_path / "set", [1] * 4)
    image = tmp_path / "set" / "edits-images" / "0.png"
    image.rename(tmp_path / "elsewhere.png")
    config = data_config(data, max_bad_share=0.5)
    assert Loader(config, processor=processor).num_steps_per_epoch == 3
    (tmp_path / "elsewhere.png").rename(image)
    assert Loader(config, processor=processor).num_steps_per_epoch == 4


def test_a_target_that_changed_its_shape_is_bad(tmp_path, processor):
    data = write_authors(tmp_path / "set", [1] * 4)
    config = data_config(data, num_ratios=11, anchor_px=128 * 128)
    Loader(config, processor=processor)
    picture(np.random.default_rng(0), 90, 60).save(tmp_path / "set" / "edits-images" / "1.png")
    loader = Loader(config, processor=processor)
    ids(loader, 4)
    assert [bad.reason for bad in loader.bad.last] == [
        "is 90x60 and belongs to the bucket 192x128, its header said 128x128"
    ]


def test_no_usable_sample_is_an_error(tmp_path, processor):
    data = write_authors(tmp_path / "set", [0, 0])
    for number in (0, 1):
        spoil(tmp_path / "set", number, "truncated")
    with pytest.raises(ValueError, match="200 batches in a row had no usable sample"):
        next(Loader(data_config(data, max_bad_share=1.0), processor=processor))
    data = write_authors(tmp_path / "other", [0, 0])
    for number in (0, 1):
        spoil(tmp_path / "other", number, "missing")
    with pytest.raises(ValueError, match="none of 2 samples can be used"):
        Loader(data_config(data, max_bad_share=1.0), processor=processor)
    with pytest.raises(ValueError, match="data.sources: must name at least one source"):
        Loader(data_config(), processor=processor)


# Dropped captions


def test_dropping_captions_keeps_the_pictures(mixed, processor):
    kept = Loader(data_config(mixed), processor=processor)
    dropped = Loader(data_config(mixed, drop_prompt_rate=1.0), processor=processor)
    for _ in range(24):
        with_words, without = next(kept), next(dropped)
        assert with_words.sample_ids == without.sample_ids
        assert with_words.instructions[0] and without.instructions == ("",)
        grids = [batch.inputs.image_grid_thw for batch in (with_words, without)]
        assert (grids[0] is None and grids[1] is None) or torch.equal(*grids)
        text = processor.decode(without.inputs.input_ids[0].tolist())
        assert not set(text.split()) & {"cat", "tree", "birds", "river", "red", "a", "the"}
        last = without.inputs.input_ids[0, -1]
        assert last == processor.tokens.vision_start == with_words.inputs.input_ids[0, -1]


def test_share_of_dropped_captions(mixed, processor):
    loader = Loader(data_config(mixed, drop_prompt_rate=0.3), processor=processor)
    reader = loader.reader
    drops = [reader.drops_prompt(number, round) for number in range(24) for round in range(100)]
    assert np.mean(drops) == pytest.approx(0.3, abs=0.04)
    assert [reader.drops_prompt(5, round) for round in range(50)] != [reader.drops_prompt(6, r) for r in range(50)]


def test_dropping_leaves_no_words_of_earlier_turns():
    from uniworld.data.samples import Picture, make_sample

    conversations = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "like <image>, please"},
        {"from": "gpt", "value": "Here it is: <gen_image>"},
    ]
    sample = make_sample("x", conversations, [Picture(n, n) for n in "abc"])
    assert sample.instruction == "like , please"
    values = [turn["value"] for turn in sample.without_prompt().conversations]
    assert values == ["<image>", "", "<image>", "<gen_image>"]
    assert sample.without_prompt().references == sample.references


@pytest.fixture(autouse=True)
def warnings_reach_caplog(caplog):
    caplog.set_level(logging.WARNING, logger="uniworld.data")


# Processes

SIGNALLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from data_files import data_config
from test_data_check import tiny_processor
from uniworld.data.loader import Loader

os.setpgid(0, 0)
told = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: told.append(number))
loader = Loader(data_config(Path(sys.argv[2]), num_workers=2), processor=tiny_processor())
next(loader)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    subprocess.run(["bash", "-c", f"kill -{int(number)} -{os.getpid()}"])  # from another process, to the whole group
    next(loader)
for _ in range(30):
    next(loader)
print(len(told), "signals", flush=True)
"""  # and it ends without closing the loader


def test_a_signal_to_the_job_leaves_the_workers_to_the_trainer(mixed, tmp_path):
    """As Slurm and terminals do."""
    command = [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), str(mixed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 signals\n"
