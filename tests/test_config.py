"""The training configuration: reading, overriding, refusing, writing back."""

from pathlib import Path

import pytest

from uniworld.config import TrainConfig, from_dict, load_config, to_dict, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refused(message, tree):
    with pytest.raises(ValueError) as caught:
        from_dict(TrainConfig, tree)
    assert str(caught.value) == message


def test_an_empty_file_is_all_defaults(file):
    assert load_config(file("")) == TrainConfig()


def test_values_of_every_kind(file):
    config = load_config(
        file(
            """
            num_steps: 7
            model: {path: here, use_t5: true}
            data: {sources: [{path: a.txt}, {path: b.tar, kind: webdataset, weight: 2}]}
            optim: {lr: 1e-6, betas: [0.8, 0.95]}
            sharding: {zero_stage: 3, checkpoint_blocks: [double]}
            wandb_project: null
            """
        )
    )
    assert (config.num_steps, config.model.path, config.model.use_t5) == (7, "here", True)
    assert [(s.path, s.kind, s.weight) for s in config.data.sources] == [
        ("a.txt", "auto", 1.0),
        ("b.tar", "webdataset", 2.0),
    ]
    assert (config.optim.lr, config.optim.betas) == (1e-6, (0.8, 0.95))  # YAML 1.1 reads 1e-6 as text
    assert (config.sharding.zero_stage, config.sharding.checkpoint_blocks) == (3, ("double",))


def test_overrides_win_and_make_sections(file):
    path = file("optim: {lr: 0.1, eps: 0.5}")
    config = load_config(path, ["optim.lr=1e-4", "data.batch_size=3", "stage.preset=stage2", "run_dir=x/y=z"])
    assert (config.optim.lr, config.optim.eps, config.data.batch_size) == (1e-4, 0.5, 3)
    assert (config.stage.preset, config.run_dir) == ("stage2", "x/y=z")
    assert load_config(path, ["data.sources=[{path: c.txt}]"]).data.sources[0].path == "c.txt"


def test_a_resolved_config_reads_back_equal(file):
    text = "optim: {lr: 1e-7}\nvalidation: {prompts: [a, b]}\nsharding: {checkpoint_blocks: [single]}"
    config = load_config(file(text))
    assert load_config(file(to_yaml(config))) == config
    assert to_dict(config)["sharding"]["checkpoint_blocks"] == ["single"]


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown key; known: betas, clip_norm, eps, lr, "
         "muon_lr, name, schedule, warmup_steps, weight_decay"),
        ({"optim": {"warmup_step": 1}}, "optim.warmup_step: unknown key; did you mean warmup_steps?"),
        ({"optimizer": {}}, "optimizer: unknown key; did you mean optim?"),
        ({"optim": 3}, "optim: must be a mapping, got 3"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast': must be float"),
        ({"num_steps": 1.5}, "num_steps=1.5: must be int"),
        ({"num_steps": True}, "num_steps=True: must be int"),
        ({"tensorboard": 1}, "tensorboard=1: must be bool"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=[0.9]: must have 2 entries"),
        ({"optim": {"betas": 0.9}}, "optim.betas=0.9: must be a list"),
        ({"sharding": {"zero_stage": 4}}, "sharding.zero_stage=4: must be one of 1, 2, 3"),
        ({"sharding": {"zero_stage": True}}, "sharding.zero_stage=True: must be one of 1, 2, 3"),
        ({"sharding": {"checkpoint_blocks": ["triple"]}},
         "sharding.checkpoint_blocks[0]='triple': must be one of double, single"),
        ({"sharding": {"compile_blocks": True, "zero_stage": 3}},
         "sharding.compile_blocks=True: needs sharding.zero_stage 1 or 2, not 3"),
        ({"sharding": {"offload_optimizer": True, "zero_stage": 3}},
         "sharding.offload_optimizer=True: needs sharding.zero_stage 1 or 2, not 3"),
        ({"sharding": {"offload_optimizer": True}, "optim": {"name": "prodigy"}},
         "sharding.offload_optimizer=True: needs optim.name adamw, not prodigy"),
        ({"optim": {"name": "muon"}},
         "optim.name=muon: is of train-part alone; stages have adamw, prodigy or adamw8bit"),
        ({"optim": {"muon_lr": 0}}, "optim.muon_lr=0.0: must be above 0"),
        ({"data": {"sources": [{"path": "a", "wieght": 1}]}},
         "data.sources[0].wieght: unknown key; did you mean weight?"),
        ({"num_steps": 0}, "num_steps=0: must be at least 1"),
        ({"data": {"batch_size": -1}}, "data.batch_size=-1: must be at least 1"),
        ({"log_every_steps": 0}, "log_every_steps=0: must be at least 1"),
        ({"optim": {"warmup_steps": -1}}, "optim.warmup_steps=-1: must be at least 0"),
        ({"validation": {"every_steps": -1}}, "validation.every_steps=-1: must be at least 0"),
        ({"data": {"focus_weight": 0.5}}, "data.focus_weight=0.5: must be from 1 to 1000"),
        ({"data": {"drop_t5_rate": 2}}, "data.drop_t5_rate=2.0: must be from 0 to 1"),
        ({"stage": {"preset": "lora"}}, "stage.preset=lora: needs model.lora_rank"),
        ({"ema": {"decay": 1.5}}, "ema.decay=1.5: must be from 0 to 1"),
        ({"optim": {"lr": 0}}, "optim.lr=0.0: must be above 0"),
        ({"stage": {"preset": "custom"}}, "stage.patterns=[]: go with preset custom, and only with it"),
        ({"stage": {"patterns": ["a.*"]}}, "stage.patterns=['a.*']: go with preset custom, and only with it"),
        ({"validation": {"prompts": ["a", "b"], "images": ["c"]}}, "validation.images: give one a prompt, or none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes_are_named(tree, message):
    refused(message, tree)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr", "override 'optim.lr': must be key=value, such as optim.lr=1e-4"),
        ("num_steps.x=1", "override 'num_steps.x=1': num_steps is no section"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean lr?"),
        ("data.sources=[{path", "override 'data.sources=[{path': the value is not YAML (expected ',' or '}', but got "
         "'<stream end>'); quote it for the shell"),
    ],
)
def test_mistakes_in_overrides_are_named(file, override, message):
    with pytest.raises(ValueError) as caught:
        load_config(file("num_steps: 3"), [override])
    assert str(caught.value) == message


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(file("a: [1,"))
    with pytest.raises(ValueError, match=r"must be a mapping, got \[1\]"):
        load_config(file("[1]"), ["optim.lr=1"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_our_configs_are_valid(path):
    config = load_config(path)
    assert config.data.sources or config.data.precomputed
    assert config.run_dir == f"runs/{path.stem}"


def test_the_papers_settings_are_in_our_configs():
    """Stage 1: AdamW at 1e-3; stage 2: at 1e-6 after 5,000 warm-up steps. Nothing is recomputed, as it fits without."""
    folder = CONFIGS[0].parent
    first, second = load_config(folder / "stage1_512.yaml"), load_config(folder / "stage2_512.yaml")
    for config in (first, second):
        assert (config.optim.betas, config.optim.weight_decay, config.optim.clip_norm) == ((0.9, 0.99), 0.0, 1.0)
        assert (config.ema.decay, config.data.anchor_px, config.sharding.zero_stage) == (0.999, 512 * 512, 2)
    assert (first.optim.lr, first.stage.preset) == (1e-3, "stage1")
    assert (second.optim.lr, second.optim.warmup_steps, second.stage.preset) == (1e-6, 5000, "stage2")
    assert second.sharding.checkpoint_blocks == ()
    assert second.data.region_weight == "log"
