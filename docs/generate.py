"""Write the generated parts of the reference: python docs/generate.py (make docs runs it).

In a page, such a part is between `<!-- generated: NAME -->` and `<!-- end -->`; everything else is written by hand. The
pages are in git, so that they can be read without the site; tests/unit/test_docs.py compares them with their sources.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from seqmill.cli.main import EXIT_CODES, GROUPS, make_parser
from seqmill.run.settings import allowed_values
from seqmill.spec.models import find_model
from seqmill.spec.released import read_releases

REPOSITORY = Path(__file__).parents[1]
REFERENCE = REPOSITORY / "docs/reference"
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGE = re.compile(r"docs/([\w-]+)/([\w-]+)\.md")


def settings() -> Iterator[str]:
    """Yield a section per setting of the schema."""
    schema = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
    for name, rule in schema["properties"].items():
        default = json.dumps(rule["default"]).strip('"')
        yield f"## {name}\n"
        text = PAGE.sub(lambda page: f"[{page[2].replace('-', ' ')}](../{page[1]}/{page[2]}.md)", rule["description"])
        yield f"{text}\n"
        yield f"- Values: {allowed_values(rule)}"
        yield f"- Default: {'none' if default in ('', '[]') else f'`{default}`'}\n"


def models() -> Iterator[str]:
    """Yield a table of the released models."""
    yield "| model | layers | dimensions | download | license |"
    yield "|---|---|---|---|---|"
    for name, release in read_releases().items():
        shape = find_model(name).architecture
        assert shape is not None
        size = f"{release.size / 1e9:.2f} GB" if release.size else "unknown"
        license_ = release.license.name if release.license else "unknown"
        yield f"| `{name}` | {shape.num_layers} | {shape.hidden_dim:,} | {size} | {license_} |"
    yield "\nCite, with the model:\n"
    cited: dict[str, list[str]] = {}
    for name, release in read_releases().items():
        if release.citation:
            paper = release.citation
            text = f"{paper.authors} ({paper.year}). [{paper.title}]({paper.link}). {paper.journal}."
            cited.setdefault(text, []).append(f"`{name}`")
    for text, names in cited.items():
        yield f"- {', '.join(names)}: {text}"


def commands() -> Iterator[str]:
    """Yield a section per command, from its parser."""
    for title, group in GROUPS.items():
        yield f"## {title.capitalize()}\n"
        for name in group:
            yield from command(make_parser(name, f"seqmill {name}"))
    yield f"## Exit codes\n\n```text\n{EXIT_CODES}\n```"


def command(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a command's section: what it does, its arguments and options, and its epilog."""
    actions = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    names = [usage_name(action) for action in actions if not action.option_strings]
    yield f"### {parser.prog}\n"
    yield f"{markdown(parser.description or '').strip()}\n"
    options = ["[options]"] if len(actions) > len(names) else []
    yield f"```text\n{' '.join([parser.prog, *names, *options])}\n```\n"
    if actions:
        yield "| option | meaning |"
        yield "|---|---|"
    for action in actions:
        yield f"| {invocation(action)} | {explanation(parser, action)} |"
    yield ""
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"


def usage_name(action: argparse.Action) -> str:
    """Return an argument as in a usage line: [NAME] if it may be left out."""
    name = str(action.metavar or action.dest).upper()
    return f"[{name}]" if action.nargs in ("?", "*") else name


def invocation(action: argparse.Action) -> str:
    """Return an option or argument such as `--cores CORES`."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest).upper()
    return f"`{' '.join(part for part in (', '.join(action.option_strings), value) if part)}`"


def explanation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return an option's help, with the values that it allows."""
    text = markdown((action.help or "") % {**vars(action), "prog": parser.prog})
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    needed = " Required." if action.required and action.option_strings else ""
    return f"{text}.{choices}{needed}" if choices or needed else text


def markdown(text: str) -> str:
    """Escape what is not meant as Markdown or HTML."""
    return re.sub(r"([|<*])", r"\\\1", text)


PARTS = {"settings": settings, "models": models, "commands": commands}


def generated(page: str) -> str:
    """Return a page with its generated parts as their sources are now."""
    return PART.sub(lambda part: f"{part[1]}\n" + "\n".join(PARTS[part[2]]()).rstrip() + f"\n\n{part[3]}", page)


if __name__ == "__main__":
    for path in REFERENCE.glob("*.md"):
        path.write_text(generated(path.read_text()))
