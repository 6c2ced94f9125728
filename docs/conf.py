"""The documentation site: `make docs` builds it of the pages of this repository, and fails for any link that leads nowhere."""

import re
from pathlib import Path

import sedtrain

ROOT = Path(__file__).parents[1]
project, author, version = "sedtrain", "the authors of sedtrain", sedtrain.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
include_patterns = [
    "docs/*.md",
    "docs/zh/*.md",
    "recipes/*/README.md",
    "benchmarks/README.md",
    "notebooks/README.md",
    "C*.md",
]
root_doc = "docs/index"
html_theme, html_title = "furo", "sedtrain"
html_static_path, html_css_files = ["_static"], ["site.css"]
myst_enable_extensions, myst_heading_anchors = ["colon_fence"], 4
autodoc_member_order, autodoc_typehints, default_role = "bysource", "description", "code"
copybutton_prompt_text = "$ "
highlight_language = "none"  # of blocks that name none: commands and what they print

LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
LISTED = re.compile(r"([a-z_][\w, ]*): +(?=\S)")


def with_pages(page: Path, text: str, moved: str = "") -> str:
    """Links to a folder lead to its README.md; `moved` is the way from a page back to where its links start."""

    def link(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        inside = f"{found[1].rstrip('/')}/README.md" if (target / "README.md").is_file() else found[1]
        return f"]({moved}{inside}"

    return LINK.sub(link, text)


def read(app, name: str, source: list[str]) -> None:
    """The start page begins with the first screen of README.md."""
    page = ROOT / f"{name}.md"
    if page.is_file():
        source[0] = with_pages(page, source[0])
    if name == root_doc:
        screen, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use a model in Python")
        source[0] = with_pages(ROOT / "README.md", screen, "../") + source[0]


def docstring(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Lines such as `audio: path of a file` become a list of names, as they are meant."""
    made, was_listed = [], False
    for line in lines:
        found = LISTED.match(line)
        if bool(found) != was_listed and not line.startswith(" "):
            made.append("")
        was_listed = bool(found) or (was_listed and line.startswith(" "))
        made.append(f":param {found[1]}: {line[found.end() :]}" if found else line)
    lines[:] = made


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring)
