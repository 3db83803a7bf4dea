"""Links that lead out of this folder, on the site: pictures are copied, other files are the repository's.

On the code-hosting site they are relative links. `mkdocs build --strict` finds those that lead nowhere.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)(\[[^\]]*\]\()((?:\.\./)+[^)#\s]+)")
log = logging.getLogger("mkdocs.hooks.site")


def outside(page: str, target: str) -> str | None:
    """The path from the root of the repository of a file that is not in docs/."""
    path = os.path.normpath(Path("docs", page).parent / target)
    return None if path.startswith("docs" + os.sep) else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pictures = set()
    for file in files.documentation_pages():
        for is_picture, _, target in LINK.findall(Path(str(file.abs_src_path)).read_text()):
            if is_picture and (path := outside(file.src_uri, target)) is not None and (ROOT / path).is_file():
                pictures.add(path)
    for path in sorted(pictures):
        files.append(File.generated(config, f"pictures/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def moved(link: re.Match) -> str:
        is_picture, before, target = link.groups()
        if (path := outside(page.file.src_uri, target)) is None:
            return link[0]
        if not (ROOT / path).exists():
            log.warning("%s: %s is not there", page.file.src_uri, target)
        here = os.path.relpath(f"pictures/{path}", Path(page.file.src_uri).parent)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return is_picture + before + (here if is_picture else f"{config.repo_url}/{kind}/main/{path}")

    return LINK.sub(moved, markdown)
