"""What `chat` does: one message answered once, or a conversation at the prompt."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from uniworld.cli_draw import (
    checked_request,
    load_engine,
    note_random_weights,
    plain_warnings,
    print_drawn,
    print_timings,
    stderr_console,
    step_progress,
)
from uniworld.cli_options import DrawOptions, LoadOptions, ReportOptions

if TYPE_CHECKING:
    from PIL import Image

    from uniworld.engine import ChatReply, Engine

HELP = """\
/image FILE             show a picture with your next message
/mode auto|image|text   who decides between a picture and text
/new                    forget the conversation
/help                   this list
/quit                   leave (also Ctrl-D); Ctrl-C stops an answer"""
CHAT_NOTE = (
    "note: the weights of model {model!r} are random, nothing was trained: "
    "its words and pictures are noise and show only that the whole pipeline runs"
)
MODES = ("auto", "image", "text")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is answered."""

    mode: str
    max_new_tokens: int
    temperature: float


def chat(
    message: str | None,
    paths: Sequence[Path],
    folder: Path,
    text: TextOptions,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    from uniworld.models.images import read_image

    load.refuse_sequence_parallel()
    if message is None and sys.stdin is None:
        raise ValueError("standard input is closed, so there is nobody to talk to; give a MESSAGE")
    check_folder(folder)
    settings = drawing.settings()
    console = stderr_console(report)
    with plain_warnings(console):
        images = [read_image(path) for path in paths]
        checked_request(message or "", images, settings)
        engine, load_s = load_engine(load, drawing.t5, report)
        note_random_weights(engine, CHAT_NOTE)
        if report.verbose:
            print_timings(console, {"load": load_s})
        talk = Talk(
            engine=engine, folder=folder, text=text, mode=text.mode, settings=settings, report=report, images=images
        )
        if message is None:
            talk.converse(console)
        else:
            talk.say(message, console)


def check_folder(folder: Path) -> None:
    """Raise a ValueError unless pictures can be written into `folder`, which need not exist yet."""
    from uniworld.models.images import check_writable

    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(f"--output {folder}: {existing} is a file, must be a folder")
    try:
        check_writable(existing / "picture.png")
    except ValueError as error:
        raise ValueError(f"--output {folder}: {existing} cannot be written to") from error


@dataclass(kw_only=True)
class Talk:
    """A conversation: what was said so far, and the pictures to show with the next message."""

    engine: "Engine"
    folder: Path
    text: TextOptions
    mode: str
    settings: dict[str, Any]
    report: ReportOptions
    images: list["Image.Image"] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def converse(self, console: Console) -> None:
        """Read messages until the end of input. A mistake is reported and the conversation goes on."""
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401 (gives `input` editing and history)

            console.print("/help lists the commands, Ctrl-D leaves", style="dim")
        while (line := read_line(interactive)) is not None:
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not self.command(line, console):
                        return
                else:
                    self.say(line, console)
            except (ValueError, OSError) as error:
                print("error:", " ".join(str(error).split()), file=sys.stderr)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\nstopped", file=sys.stderr)

    def command(self, line: str, console: Console) -> bool:
        """Obey a line that starts with a slash; False ends the conversation."""
        from uniworld.models.images import read_image

        name, _, value = line.strip().partition(" ")
        value = value.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            console.print(HELP, markup=False)
        elif name == "/new":
            self.messages, self.images = [], []
        elif name == "/image":
            self.images.append(read_image(Path(value)))
        elif name == "/mode" and value in MODES:
            self.mode = value
        elif name == "/mode":
            raise ValueError(f"/mode {value}: must be one of {', '.join(MODES)}")
        else:
            raise ValueError(f"{name}: no such command; /help lists them")
        return True

    def say(self, line: str, console: Console) -> None:
        """Send one message, show the answer, and remember both; neither where it fails or is stopped."""
        question = {"role": "user", "content": _content(line, self.images)}
        reply = self._ask([*self.messages, question], console)
        self.messages += [question, {"role": "assistant", "content": _content(reply.text, reply.images)}]
        self.images = []

    def _ask(self, messages: list[dict[str, Any]], console: Console) -> "ChatReply":
        printed = []

        def on_text(piece: str) -> None:
            printed.append(piece)
            print(piece, end="", flush=True)

        with step_progress(console, at_once=False) as on_step:
            reply = self.engine.chat(
                messages,
                mode=self.mode,
                max_new_tokens=self.text.max_new_tokens,
                temperature=self.text.temperature,
                on_text=on_text,
                on_step=on_step,
                **self.settings,
            )
        if printed:
            print(flush=True)
        for image in reply.images:
            print(save_picture(image, self.folder), flush=True)
        if reply.result is not None:
            print_drawn(console, reply.result)
        if self.report.verbose:
            print_timings(console, reply.timings, reply.result and reply.result.num_inference_steps)
        return reply


def _content(text: str, images: Sequence["Image.Image"]) -> list[dict[str, Any]]:
    """The content of an OpenAI-style message."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    return parts + [{"type": "image", "image": image} for image in images]


def read_line(interactive: bool) -> str | None:
    """One line from the user, or None at the end of input."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None


def save_picture(image: "Image.Image", folder: Path) -> Path:
    """Write `image` under the first free number in `folder`, which is made where needed."""
    from uniworld.models.images import write_image

    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"picture-{i:03d}.png" for i in itertools.count(1))
    path = next(path for path in paths if not path.exists())
    write_image(image, path)
    return path
