"""Hooks of mkdocs: the README, the changelog and every linked file become pages; LaTeX becomes MathML.

Pages link to files of the repository as on GitHub. The site shows formulas without a network or a script.
"""

import html
import os.path
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cuda"}


def in_site(name: str) -> str:
    """The path in the site of a file of the repository."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"plots/{Path(name).name}" if name.endswith(".svg") else f"source/{name}.md"


def in_repository(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return next((name for name, made in PAGES.items() if made == page), f"docs/{page}")


def relinked(text: str, page: str, linked: set[str]) -> str:
    """`text` with its links to files of the repository turned into links of the site; collects them."""
    folder = os.path.dirname(in_repository(page))

    def link(found: re.Match) -> str:
        name = os.path.normpath(os.path.join(folder, found[1]))
        linked.add(name)
        return os.path.relpath(in_site(name), os.path.dirname(page) or ".")

    return LINK.sub(link, text)


def on_files(files, config):
    """Adds the pages and plots that are not in docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    linked: set[str] = set()
    for file in files.documentation_pages():
        relinked(file.content_string, file.src_uri, linked)
    for name in sorted(linked):
        path, page = ROOT / name, in_site(name)
        if files.get_file_from_path(page) or not path.is_file():  # a link to nothing: strict mode names it
            continue
        if path.suffix == ".svg":
            files.append(File.generated(config, page, abs_src_path=str(path)))
        else:
            code = f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n"
            files.append(File.generated(config, page, content=code))
    return files


def on_page_markdown(markdown, page, config, files):
    return (
        markdown if page.file.src_uri.startswith("source/") else relinked(markdown, page.file.src_uri, set())
    )


def on_page_content(content, page, config, files):
    """Formulas, as pymdownx.arithmatex marks them, in MathML."""

    def formula(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2]), display=display)

    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL
    )
