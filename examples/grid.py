"""Runs the commands that README.md shows under `<!-- grid -->` and sets what they drew side by side:
python examples/grid.py"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images" / "tiny.png"
SIDE_PX, GAP_PX, CAPTION_PX, COLUMNS = 192, 8, 22, 3
BLOCK = re.compile(r"<!-- grid -->\n+```bash\n(.*?)```", re.DOTALL)


def commands() -> list[list[str]]:
    """The commands of README's block as argument lists, a line that ends in a backslash joined with the next."""
    block = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    if block is None:
        sys.exit("README.md: has no bash block under <!-- grid -->")
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("uniworld ")]


def cell(command: list[str]) -> Image.Image:
    """The pictures given, if any, the one drawn, and the words."""
    given = [ROOT / word for word in command[2:] if word.startswith("examples/")]
    words = next(word for word in command[2:] if not word.startswith(("examples/", "-")))
    pictures = [*given, ROOT / command[command.index("-o") + 1]]
    made = Image.new("RGB", (2 * SIDE_PX + GAP_PX, SIDE_PX + CAPTION_PX), "white")
    for path, left in zip(pictures, (0, SIDE_PX + GAP_PX)[-len(pictures) :], strict=True):
        with Image.open(path) as picture:
            made.paste(picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), (left, 0))
    ImageDraw.Draw(made).text((0, SIDE_PX + 4), f"{command[1]}: {words}", fill="black", font_size=13)
    return made


def main() -> None:
    cells = []
    for command in commands():
        (ROOT / command[command.index("-o") + 1]).parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "uniworld.cli", *command[1:]], check=True, cwd=ROOT)
        cells.append(cell(command))
    width, height = (size + 2 * GAP_PX for size in cells[0].size)
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    for number, picture in enumerate(cells):
        page.paste(picture, (number % COLUMNS * width + GAP_PX, number // COLUMNS * height + GAP_PX))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    page.save(OUT, optimize=True)
    print(OUT)


if __name__ == "__main__":
    main()
