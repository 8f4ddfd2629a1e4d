"""What the documentation says, held to the code: snippets run, links lead somewhere, options and ops exist."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from uniworld import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "python.md"], ids=lambda page: page.name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), namespace)
    assert (tmp_path / "snow.png").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_are_commands(page, monkeypatch, capsys):
    """Every `uniworld <command> --option` in a bash block: the command and its options exist."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    for line in re.findall(r"(?:^|/)uniworld (.+)", shell, re.MULTILINE):
        command, *words = shlex.split(line)
        group = [command, words[0]] if command == "eval" else [command]
        monkeypatch.setattr(sys, "argv", ["uniworld", *group, "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, line
        known = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", capsys.readouterr().out))
        used = {word for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)}
        assert used <= known, f"{line}: no option {used - known}"


def test_every_op_is_on_the_kernels_page():
    from uniworld.kernels.registry import load_ops

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"`(\w+)`", "\n".join(line for line in page.splitlines() if line.startswith("| `"))))
    assert shown == load_ops().keys()


def test_ci_reads_the_quick_start_from_the_readme():
    """`.ci/run` runs what stands under these two marks, and only one line each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"<!-- quick-start: (\w+) -->\n+```bash\n([^\n]+)\n```\n", text))
    assert lines.keys() == {"edit", "test"}
    assert all("-c constraints.txt" in line for line in lines.values())
    assert "edited.png" in lines["edit"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
