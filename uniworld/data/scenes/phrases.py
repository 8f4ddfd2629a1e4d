"""How templates are written down: one a line, under the `# name` of their section."""


def parse_phrases(text: str) -> dict[str, tuple[str, ...]]:
    """Section name -> its templates, which hold slots as of `str.format`.

    Raises: ValueError on a section that stands twice or is empty, and on a template that stands twice in one.
    """
    sections: dict[str, list[str]] = {}
    name = None
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("# "):
            name = line[2:]
            if name in sections:
                raise ValueError(f"section {name!r}: stands twice")
            sections[name] = []
        elif name is None:
            raise ValueError(f"template {line!r}: stands before the first section")
        elif line in sections[name]:
            raise ValueError(f"template {line!r}: stands twice in {name!r}")
        else:
            sections[name].append(line)
    for name, templates in sections.items():
        if not templates:
            raise ValueError(f"section {name!r}: is empty")
    return {name: tuple(templates) for name, templates in sections.items()}
