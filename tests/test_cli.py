"""The command line: help, errors and what they leave behind, pictures with `tiny`, chat, interruption, environment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from uniworld import cli, cli_chat, cli_draw, environment
from uniworld.cli_options import parse_lora, parse_size

ROOT = Path(__file__).resolve().parent.parent
CAT = ROOT / "examples" / "cat.jpg"
COMMANDS = ("edit", "generate", "perceive", "chat", "convert", "check-data", "env", "eval")
SMALL = ["--steps", "2", "--size", "64x96", "--seed", "7", "--device", "cpu"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process, in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["uniworld", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


class FakeEngine:
    """Records what it is asked; draws one grey picture and answers with the number of messages."""

    def __init__(self, random_weights=False, fail=None):
        self.model = SimpleNamespace(random_weights=random_weights, name="fake")
        self.calls, self.fail = [], fail

    def _draw(self, settings):
        on_step = settings.pop("on_step")
        num_steps = settings["num_inference_steps"] or 28
        for step in range(1, num_steps + 1):
            on_step(SimpleNamespace(step=step, num_inference_steps=num_steps))
            if self.fail:
                raise self.fail
        return SimpleNamespace(
            images=[Image.new("RGB", (64, 64), "grey")],
            timings={"condition": 1.0, "denoise": 2.0, "decode": 0.5, "total": 3.5},
            seed=settings["seed"],
            width=64,
            height=64,
            num_inference_steps=num_steps,
            graphs="eager: a fake",
            offload="parts: a fake",
            step_cache=settings["cache"] and SimpleNamespace(num_computed=1),
            step_errors=[],
        )

    def edit(self, images, prompt, **settings):
        self.calls.append(("edit", images, prompt, dict(settings)))
        return self._draw(settings)

    def generate(self, prompt, **settings):
        self.calls.append(("generate", prompt, dict(settings)))
        return self._draw(settings)

    def perceive(self, image, task, *, target=None, **settings):
        self.calls.append(("perceive", image, task, target, dict(settings)))
        return self._draw(settings)

    def chat(self, messages, *, mode, max_new_tokens, temperature, on_text, **settings):
        self.calls.append(("chat", messages, mode))
        if self.fail:
            raise self.fail
        if mode == "image":
            result = self._draw(settings)
            return SimpleNamespace(text="", images=result.images, result=result, timings=result.timings)
        for piece in ("that was ", f"{len(messages)} messages"):
            on_text(piece)
        timings = {"condition": 1.5, "answer": 0.5, "total": 2.0}
        return SimpleNamespace(text=f"that was {len(messages)} messages", images=[], result=None, timings=timings)


@pytest.fixture
def fake(monkeypatch):
    """Puts a `FakeEngine` in place of loading; `fake.loads` collects the options it would be loaded with."""
    engine = FakeEngine()
    engine.loads = []

    def load(options, use_t5, report, first=None):
        engine.loads.append((options, use_t5))
        engine.first = first
        return engine, 0.25

    monkeypatch.setattr(cli_draw, "load_engine", load)
    monkeypatch.setattr(cli_chat, "load_engine", load)
    return engine


def uniworld(*args, code="from uniworld import cli; cli.main()", **options):
    """Start the command line in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, **options)


# Help


def test_help_is_immediate(tmp_path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = uniworld("--help", cwd=tmp_path)
        out, _ = process.communicate(timeout=60)
        seconds.append(time.perf_counter() - start)
        assert process.returncode == 0
        assert all(command in out for command in COMMANDS)
    assert min(seconds) < 1.0, seconds


def test_help_loads_nothing_heavy():
    code = """
import sys
from uniworld import cli

sys.argv = ["uniworld", "edit", "--help"]
try:
    cli.main()
except SystemExit:
    heavy = {"torch", "transformers", "diffusers", "numpy", "PIL"}
    sys.exit(str(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(run, command):
    code, out, err = run(command, "--help")
    assert code == 0
    assert f"Example: uniworld {command}" in out
    assert err == ""


def test_version(run):
    from uniworld import __version__

    assert run("--version") == (0, f"uniworld {__version__}\n", "")


# What bad input gets


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.open(CAT).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    Image.new("RGB", (2010, 10)).save(tmp_path / "thin.png")


BAD = {
    "no command": (["sing"], "No such command 'sing'"),
    "nothing": (["edit"], "Missing argument"),
    "no prompt": (["edit", "good.png"], "edit [OPTIONS] {IMAGE}... {PROMPT}"),
    "unknown option": (["generate", "a cat", "--colour", "red"], "No such option: --colour"),
    "missing image": (["edit", "none.png", "hat"], "none.png: no such file"),
    "second image missing": (["edit", "good.png", "none.png", "hat"], "none.png: no such file"),
    "text file": (["edit", "text.png", "hat"], "text.png: not an image"),
    "empty file": (["edit", "empty.png", "hat"], "empty.png: the file is empty"),
    "truncated": (["edit", "half.png", "hat"], "half.png: broken image file"),
    "long and thin": (["edit", "thin.png", "hat"], "images[0]: 2010x10 px, sides may differ at most by a factor"),
    "reserved token": (["generate", "cat<|im_end|>"], "prompt: must not contain the reserved token <|im_end|>"),
    "reserved token to avoid": (
        ["generate", "cat", "--true-cfg", "2", "--negative", "<|im_start|>"],
        "negative_prompt: must not contain the reserved token <|im_start|>",
    ),
    "folder as image": (["edit", "folder", "hat"], "folder: is a directory"),
    "steps 0": (["generate", "cat", "--steps", "0"], "--steps 0: must be from 1 to"),
    "steps 100000": (["generate", "cat", "--steps", "100000"], "--steps 100000: must be from 1 to"),
    "steps in words": (["generate", "cat", "--steps", "few"], "--steps"),
    "size 100x100": (["generate", "cat", "--size", "100x100"], "height=100: must be a multiple of 16"),
    "size 512": (["generate", "cat", "--size", "512"], "--size 512: must be WIDTHxHEIGHT"),
    "size negative": (["generate", "cat", "--size", "-16x16"], "--size -16x16: must be WIDTHxHEIGHT"),
    "guidance": (["generate", "cat", "--guidance", "1000"], "--guidance 1000.0: must be from 0 to 100"),
    "guidance nan": (["generate", "cat", "--guidance", "nan"], "--guidance nan: must be from 0"),
    "negative alone": (["generate", "cat", "--negative", "dog"], "--negative: only has an effect with --true-cfg"),
    "seed": (["generate", "cat", "--seed", "-1"], "--seed -1: must be from 0 to"),
    "dtype": (["generate", "cat", "--dtype", "int3"], "'int3' is not one of 'auto', 'bfloat16'"),
    "task": (["perceive", "good.png", "smell"], "must be one of canny, depth"),
    "target": (["perceive", "good.png", "depth", "--target", "cat"], "only the tasks segment and detect"),
    "output folder": (["generate", "cat", "-o", "nowhere/out.png"], "nowhere/out.png: the directory nowhere"),
    "output suffix": (["generate", "cat", "-o", "out.xyz"], "out.xyz: suffix '.xyz'"),
    "output is a folder": (["generate", "cat", "-o", "folder"], "folder: is a directory"),
    "chat image": (["chat", "hi", "--image", "none.png"], "none.png: no such file"),
    "chat on several GPUs": (["chat", "hi", "--sequence-parallel"], "only edit, generate and perceive can run on"),
    "chat mode": (["chat", "hi", "--mode", "song"], "'song' is not one of 'auto', 'image', 'text'"),
    "chat output": (["chat", "hi", "-o", "good.png"], "good.png is a file, must be a folder"),
    "chat output in /proc": (["chat", "hi", "-o", "/proc/mine"], "--output /proc/mine: /proc cannot be written to"),
}


def assert_refused(answer, message):
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_loading(run, fake, bad_files, tmp_path, args, message):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run(*args), message)
    assert sorted(tmp_path.rglob("*")) == before
    assert fake.loads == []


BAD_TO_LOAD = {
    "model": (["--model", "nowhere"], "model=nowhere: no such folder"),
    "flux": (["--flux", "nowhere"], "flux=nowhere: no such folder"),
    "siglip": (["--siglip", "nowhere"], "siglip=nowhere: no such folder"),
    "device": (["--device", "abacus"], "--device abacus: must be cpu, cuda or cuda:N"),
    "device number": (["--device", "cuda:99"], "--device cuda:99: torch"),
    "attention": (["--attention", "brief"], "attention='brief'"),
    "lora": (["--lora", "none.safetensors"], "lora=none.safetensors: no such file"),
    "lora and errors": (
        ["--lora", "cat", "--quantize", "fp8", "--report-error"],
        "--lora cat: with report_error steps are held against a DiT without LoRA",
    ),
    "lora scale": (["--lora", "a.safetensors:big"], "--lora a.safetensors:big: big is no scale, must be a number"),
    "no launcher": (["--sequence-parallel"], "sequence_parallel: start one process a GPU, for example with torchrun"),
    "quantize": (["--quantize", "int8"], "quantize='int8': must be one of fp8, nf4"),
    "offload": (["--offload", "disk"], "offload='disk': must be one of auto, modulation, parts, cpu"),
}


@pytest.mark.parametrize("args, message", BAD_TO_LOAD.values(), ids=BAD_TO_LOAD)
def test_a_model_that_cannot_be_loaded_is_refused(run, tmp_path, args, message):
    assert_refused(run("generate", "cat", "-q", *args), message)
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_missing_folders(run, tmp_path):
    assert_refused(run("convert", "no-qwen", "no-flux", "-o", "out", "-q"), "qwen=no-qwen: no such folder")
    assert list(tmp_path.iterdir()) == []


def test_bugs_are_told_from_mistakes(run, fake, monkeypatch):
    fake.fail = TypeError("unexpected\nthing")
    code, out, err = run("generate", "cat")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: TypeError: unexpected thing (set UNIWORLD_DEBUG=1 to see where)"
    monkeypatch.setenv("UNIWORLD_DEBUG", "1")
    with pytest.raises(TypeError):
        cli.main()


def test_out_of_memory_says_what_helps(run, fake, monkeypatch):
    fake.fail = type("OutOfMemoryError", (RuntimeError,), {})("tried to allocate 2 GiB")
    monkeypatch.delitem(sys.modules, "uniworld.train.trainer", raising=False)  # another test's
    code, _, err = run("generate", "cat")
    assert code == 2 and "out of GPU memory (tried to allocate 2 GiB); try a smaller --size" in err
    monkeypatch.setitem(sys.modules, "uniworld.train.trainer", None)
    assert "; try sharding.checkpoint_blocks=[double,single], " in run("generate", "cat")[2]


# Drawing


def test_options_reach_the_engine(run, fake):
    code, out, err = run(
        *("edit", CAT, CAT, "a hat", "-o", "hat.png", "--seed", 5, "--steps", 3, "--size", "128x64", "--guidance", 2),
        *("--negative", "dog", "--true-cfg", 4, "--no-t5", "--vae-tiling"),
        *(
            "--model",
            "m",
            "--flux",
            "f",
            "--siglip",
            "s",
            "--dtype",
            "float32",
            "--attention",
            "math",
            "--check-finite",
            "--compile",
        ),
        *("--cuda-graphs", "off", "--cache", "taylor", "--cache-interval", 4, "--cache-order", 2),
        *("--lora", "cat.safetensors:0.5", "--lora", "dog"),
        *("--quantize", "fp8", "--quantize-exclude", "a*", "--quantize-exclude", "b", "--report-error"),
        *("--offload", "parts"),
    )
    assert (code, out) == (0, "hat.png\n"), err
    assert "3 steps (1 computed)" in err
    (_, images, prompt, settings) = fake.calls[0]
    assert [image.size for image in images] == [(451, 300)] * 2
    assert prompt == "a hat"
    settings.pop("on_step")
    assert settings == {
        "height": 64,
        "width": 128,
        "num_inference_steps": 3,
        "guidance_scale": 2,
        "true_cfg_scale": 4,
        "negative_prompt": "dog",
        "seed": 5,
        "use_t5": False,
        "vae_tiling": True,
        "cache": "taylor",
        "cache_threshold": 0.08,
        "cache_interval": 4,
        "cache_order": 2,
    }
    from uniworld.engine import Request

    assert fake.first == Request(prompt=prompt, images=tuple(images), **settings)
    options, use_t5 = fake.loads[0]
    assert use_t5 is False
    assert vars(options) == {
        "model": "m",
        "flux": "f",
        "siglip": "s",
        "device": None,
        "dtype": "float32",
        "attention": "math",
        "check_finite": True,
        "cuda_graphs": "off",
        "lora": ["cat.safetensors:0.5", "dog"],
        "compile": True,
        "sequence_parallel": False,
        "quantize": "fp8",
        "quantize_exclude": ["a*", "b"],
        "report_error": True,
        "offload": "parts",
    }


def test_defaults_are_the_engines(fake, run):
    from uniworld.engine import Request

    assert run("generate", "cat")[0] == 0
    settings = fake.calls[0][2]
    settings.pop("on_step")
    assert Request(prompt="cat", **settings) == Request(prompt="cat")


def test_default_names_replace_nothing(run, fake, tmp_path):
    assert [run("generate", "cat")[1] for _ in range(3)] == [
        "generated.png\n",
        "generated-2.png\n",
        "generated-3.png\n",
    ]
    assert run("perceive", CAT, "depth")[1] == "depth.png\n"
    assert run("edit", CAT, "hat")[1] == "edited.png\n"


def test_a_named_output_is_replaced(run, fake, tmp_path):
    (tmp_path / "out.png").write_text("old")
    assert run("generate", "cat", "-o", "out.png")[0] == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("failure, code", [(ValueError("no"), 2), (KeyboardInterrupt(), 130)])
def test_a_failure_leaves_the_old_output(run, fake, tmp_path, failure, code):
    (tmp_path / "out.png").write_text("old")
    fake.fail = failure
    assert run("generate", "cat", "-o", "out.png")[:2] == (code, "")
    assert (tmp_path / "out.png").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_what_is_said(run, fake):
    code, out, err = run("generate", "cat", "--seed", 3, "--steps", 2)
    assert "64x64 px, 2 steps, seed 3, 3.5 s" in err
    assert "condition" not in err
    assert run("generate", "cat", "--quiet")[2] == ""
    verbose = run("generate", "cat", "-v", "--steps", 2)[2]
    for row in (
        "load 0.250",
        "condition 1.000",
        "denoise 2.000",
        "decode 0.500",
        "total 3.500",
        "denoise, a step 1.000",
    ):
        assert row in " ".join(verbose.split())


def test_random_weights_are_told_even_when_quiet(run, fake):
    fake.model.random_weights = True
    code, out, err = run("generate", "cat", "--quiet")
    assert code == 0
    assert err.count("\n") == 1
    assert "the picture is noise" in err


def test_an_animation_is_said_to_be_one(run, fake, tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    code, _, err = run("edit", "two.gif", "a hat")
    assert code == 0
    assert "note: two.gif: has 2 frames, only the first is used" in err


def test_tiny_edits_a_photograph(run, tmp_path):
    code, out, err = run("edit", CAT, "make it snow", "-o", "a.png", *SMALL)
    assert (code, out) == (0, "a.png\n"), err
    assert "64x96 px, 2 steps, seed 7" in err
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 96))
    assert run("edit", CAT, "make it snow", "-o", "b.png", "-q", *SMALL)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run("edit", CAT, "make it rain", "-o", "c.png", "-q", *SMALL)[0] == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_tiny_says_that_its_picture_is_noise(run):
    from uniworld.engine import Engine

    noise = Engine.from_pretrained("tiny", progress=False).model.random_weights
    err = run("generate", "a cat", *SMALL)[2]
    assert ("the picture is noise" in err) == noise


def test_tiny_draws_in_fp8_and_tells_the_error(run, tmp_path):
    code, out, err = run("generate", "a cat", *SMALL, "--quantize", "fp8", "--report-error", "--offload", "cpu")
    assert code == 0 and (tmp_path / out.strip()).exists(), err
    told = next(line for line in err.splitlines() if line.startswith("error of each step against"))
    errors = [float(number) for number in told.rpartition(": ")[2].split()]
    assert len(errors) == 2 and all(0 < error < 0.2 for error in errors)


def test_tiny_perceives(run, tmp_path):
    code, out, err = run("perceive", CAT, "segment", "--target", "the cat", "-v", *SMALL)
    assert (code, out) == (0, "segment.png\n"), err
    assert all(room in err for room in ("load", "condition", "denoise", "decode", "total"))


INTERRUPTIBLE = """
import contextlib, signal, sys
from uniworld import cli, cli_draw

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a background job starts

original = cli_draw.step_progress

@contextlib.contextmanager
def told(*args):
    with original(*args) as on_step:
        yield lambda info: (on_step(info), print("a step", file=sys.stderr, flush=True))

cli_draw.step_progress = told
cli.main()
"""


def test_ctrl_c_cancels_cleanly(tmp_path):
    (tmp_path / "out.png").write_text("old")
    args = ("generate", "a cat", "-o", "out.png", "--steps", "1000", "--size", "64x64")
    process = uniworld(*args, code=INTERRUPTIBLE, cwd=tmp_path)
    for line in process.stderr:
        if line == "a step\n":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "cancelled"
    assert "Traceback" not in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.png", "old")]


# Chat


def speak(monkeypatch, *lines):
    """Let the user type `lines`, then end the input."""
    remaining = iter(lines)

    def read(prompt=""):
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_chat_answers_one_message(run, fake):
    code, out, err = run("chat", "hello", "--image", CAT)
    assert (code, out, err) == (0, "that was 1 messages\n", "")
    _, messages, mode = fake.calls[0]
    assert mode == "auto"
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image"]


def test_chat_tells_seconds(run, fake):
    out, err = run("chat", "hello", "-v")[1:]
    assert out == "that was 1 messages\n"
    rows = " ".join(err.split())
    assert all(row in rows for row in ("load 0.250", "condition 1.500", "answer 0.500", "total 2.000"))
    assert "a step" not in rows
    assert "denoise, a step 1.000" in " ".join(run("chat", "hat", "--mode", "image", "--steps", 2, "-v")[2].split())


def test_chat_remembers(run, fake, monkeypatch, tmp_path):
    speak(monkeypatch, "hello", "", "/mode image", f"/image {CAT}", "a hat", "/mode text", "what is it?")
    code, out, err = run("chat", "--size", "64x64", "--steps", "2")
    assert code == 0, err
    assert out.splitlines() == ["that was 1 messages", "uniworld-chat/picture-001.png", "that was 5 messages"]
    assert Image.open(tmp_path / "uniworld-chat" / "picture-001.png").size == (64, 64)
    messages = fake.calls[-1][1]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [part["type"] for part in messages[2]["content"]] == ["text", "image"]
    assert [part["type"] for part in messages[3]["content"]] == ["image"]
    assert [part["type"] for part in messages[4]["content"]] == ["text"]


def test_chat_without_standard_input_is_refused(run, fake, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(run("chat"), "standard input is closed")
    assert fake.loads == []
    assert run("chat", "hello")[0] == 0


def test_chat_goes_on_after_mistakes(run, fake, monkeypatch):
    speak(monkeypatch, "/image none.png", "/mode song", "/sing", "hello", "/new", "hello", "/quit", "unheard")
    code, out, err = run("chat")
    assert code == 0
    assert out.splitlines() == ["that was 1 messages"] * 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: none.png: no such file",
        "error: /mode song: must be one of auto, image, text",
        "error: /sing: no such command; /help lists them",
    ]


def test_chat_forgets_a_question_that_failed(run, fake, monkeypatch):
    def fail_once(*args, **settings):
        fake.chat = answer
        raise ValueError("prompt: too long")

    answer, fake.chat = fake.chat, fail_once
    speak(monkeypatch, "too long", "short")
    code, out, err = run("chat")
    assert (code, out) == (0, "that was 1 messages\n")
    assert "error: prompt: too long\n" in err


def test_chat_numbers_go_on(run, fake, tmp_path):
    for _ in range(2):
        run("chat", "a cat", "--mode", "image", "-o", "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["picture-001.png", "picture-002.png"]


def test_tiny_chats(run, monkeypatch, tmp_path):
    speak(monkeypatch, "/mode text", f"/image {CAT}", "what is this?", "/mode image", "give it a hat")
    code, out, err = run("chat", "--max-new-tokens", 4, *SMALL)
    assert code == 0, err
    assert "error" not in err
    assert out.splitlines()[-1] == "uniworld-chat/picture-001.png"
    assert Image.open(tmp_path / "uniworld-chat" / "picture-001.png").size == (64, 96)


# The rest


def test_convert_passes_its_options_on(run, monkeypatch):
    calls = []

    def convert(qwen, flux, out, *, siglip, connectors, seed, overwrite, progress):
        calls.append((qwen, flux, str(out), siglip, connectors, seed, overwrite, progress))

    monkeypatch.setattr("uniworld.checkpoint.convert.convert", convert)
    taken = ("--siglip", "s", "--connectors", "c")
    args = ("convert", "q", "f", "-o", "dir", *taken, "--seed", 4, "--overwrite", "--quiet")
    assert run(*args) == (0, "dir\n", "")
    assert calls == [("q", "f", "dir", "s", Path("c"), 4, True, False)]
    code, out, err = run("convert", "q", "f", "-o", "dir", "-v")
    assert (code, out) == (0, "dir\n")
    assert "convert" in err and calls[1:] == [("q", "f", "dir", None, None, 0, False, True)]


def test_env_as_json(run):
    code, out, err = run("env", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    import torch

    from uniworld.kernels.registry import BACKENDS, OPS

    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report["ops"].keys() == OPS.keys()
    assert all(op["backend"] in BACKENDS and op["why"] for op in report["ops"].values())
    assert report["attention"]["backend"] in report["attention"]["backends"]
    assert report["attention"]["why"] and report["attention"]["unequal_lengths"].startswith(
        report["attention"]["backend"]
    )
    assert report["ops"]["joint_attention"]["why"] == f"see attention: {report['attention']['backend']}"


def test_env_as_tables(run):
    code, out, err = run("env")
    assert (code, err) == (0, "")
    for word in ("torch", "flash-attn", "C++ core", "joint_attention", "attention", "cache"):
        assert word in out


def test_env_tells_a_missing_core(monkeypatch):
    from uniworld.kernels import extension

    monkeypatch.setattr(extension, "_core", None)
    monkeypatch.setattr(extension, "MISSING", "the C++ core is not built (no compiler)")
    report = environment.gather()
    assert report["core"]["built"] is False
    assert ("built", "no", "the C++ core is not built (no compiler)") in environment.core_rows(report["core"])
    if report["device"]["type"] == "cpu":
        assert report["ops"]["adaln_modulate"] == {"backend": "torch", "why": "the C++ core is not built"}


def test_env_tells_what_a_forced_backend_cannot_do(monkeypatch):
    from uniworld.kernels import registry

    with registry.use_backend("torch"):
        report = environment.gather()
    assert {op["backend"] for op in report["ops"].values()} == {"torch"}
    asked, without_kernel = "UNIWORLD_KERNELS asks for it", "no kernel of ours: torch's own"
    assert {name: op["why"] for name, op in report["ops"].items()} == dict.fromkeys(report["ops"], asked) | {
        "fp8_linear": without_kernel
    }


def test_parse_lora():
    assert parse_lora("cat.safetensors") == ("cat.safetensors", 1.0)
    assert parse_lora("owner/name:0.8") == ("owner/name", 0.8)
    assert parse_lora("a:b/cat.safetensors:-1") == ("a:b/cat.safetensors", -1.0)


@pytest.mark.parametrize("text, size", [("auto", (None, None)), ("512x768", (512, 768)), ("1024X64", (1024, 64))])
def test_parse_size(text, size):
    assert parse_size(text) == size
