"""The page about training: its commands parse, its configs are there, the settings and metrics it names exist."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from uniworld.config import TrainConfig, from_dict, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
LINES = [shlex.split(line) for line in SHELL.splitlines() if line]


def lines_of(program):
    found = [words[1:] for words in LINES if words[0] == program]
    assert found
    return found


def trainings():
    """(config, overrides) of every command that reads a config, whoever launches it."""
    commands = lines_of("uniworld")
    commands += [words[words.index("uniworld.cli") + 1 :] for p in ("torchrun", "deepspeed") for words in lines_of(p)]
    return [(words[1], [w for w in words[2:] if "=" in w]) for words in commands if words[0] in ("train", "precompute")]


def test_configs_and_overrides_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = trainings()
    assert len(found) > 10
    for config, overrides in found:
        load_config(config, overrides)


def test_torchrun_takes_its_options():
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    known = "--shutdown-timeout" in parser.format_help().replace("_", "-")  # torch 2.11 does not have it yet
    for words in lines_of("torchrun"):
        if "--shutdown-timeout" in words and not known:
            continue
        parsed = parser.parse_args(words)
        assert parsed.module and parsed.training_script == "uniworld.cli"


def test_deepspeed_takes_its_options():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    for words in lines_of("deepspeed"):
        parsed = runner.parse_args(words)
        assert parsed.module and parsed.user_script == "uniworld.cli"


def test_yaml():
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    config = from_dict(TrainConfig, yaml.safe_load(text))
    assert all((ROOT / image).is_file() for image in config.validation.images)


def test_settings_named_exist():
    sections = {field.name: field.type for field in fields(TrainConfig) if is_dataclass(field.type)}
    named = set(re.findall(r"`(\w+)\.(\w+)(?:[=:][^`]*)?`", PAGE))
    named = {(section, name) for section, name in named if section in sections}
    assert len(named) > 15
    for section, name in named:
        assert name in {field.name for field in fields(sections[section])}, f"{section}.{name}"


def test_parameters_of_the_stages():
    """As `test_golden_train` and `test_lora` count them at full scale."""
    connector = {width: width * 12288 + 12288 + 12288 * 4096 + 4096 for width in (3584, 1152)}
    D = 3072
    double = 19 * (10 * D**2 + 10 * D + 2 * 128)
    single = 38 * (6 * D**2 + 6 * D + 2 * 128)
    lora = 16 * (19 * (2 * 4 * D + 2 * 2 * D) + 38 * 4 * D)
    counts = {
        "stage1": connector[3584],
        "stage2": sum(connector.values()) + double + single,
        "siglip_mlp": connector[1152],
        "lora": lora,
    }
    shown = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+)[^|]*\|$", PAGE, re.MULTILINE)
    assert {name: int(count.replace(",", "")) for name, count in shown} == counts
