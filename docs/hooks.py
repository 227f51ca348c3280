"""A hook of mkdocs: files outside docs/ that a page links to become part of the site.

The README is the start page. In the repository, links lead from file to file; here they lead from page to page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the README, and every file that it or another page links to."""
    add(files, config, "README.md")
    pages = [file for file in files if file.src_uri.endswith(".md")]
    for page in pages:  # grows
        for link in LINK.findall(page.content_string):
            path = target(page, link)
            if path.startswith("docs/") or files.get_file_from_path(path) or not (REPOSITORY / path).is_file():
                continue
            added = add(files, config, path)
            if path.endswith(".md"):
                pages.append(added)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn a link from file to file into one from page to page."""
    folder = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: posixpath.relpath(in_site(target(page.file, link[0])), folder), markdown)


def add(files: Files, config: MkDocsConfig, path: str) -> File:
    file = File.generated(config, path, abs_src_path=str(REPOSITORY / path))
    files.append(file)
    return file


def target(page: File, link: str) -> str:
    """Return where a page's relative link leads in the repository."""
    assert page.abs_src_path
    folder = Path(page.abs_src_path).relative_to(REPOSITORY).parent
    return posixpath.normpath(posixpath.join(folder.as_posix(), link))


def in_site(path: str) -> str:
    return path.removeprefix("docs/")
