"""English texts for the examples. They are downloaded once, with pip or apt-get, and kept in .cache."""

import gzip
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"
DJANGO, GCIDE = "Django==5.2.8", "dict-gcide"
MANUALS = ("faq", "howto", "internals", "intro", "misc", "ref", "topics")


def _fetch(pattern: str, command: list[str], advice: str) -> Path:
    """The file in .cache that matches `pattern`; `command` downloads it if it is missing."""
    CACHE.mkdir(exist_ok=True)
    if not list(CACHE.glob(pattern)):
        try:
            subprocess.run(command, check=True, cwd=CACHE, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{' '.join(command)} failed. {advice}") from error
    return next(CACHE.glob(pattern))


def documentation() -> list[str]:
    """Prose of Django's manual (BSD license), one text per page, without code, headings and markup."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "Django", DJANGO]
    name = DJANGO.lower().replace("==", "-")
    advice = f"Download {name}.tar.gz from the package index and put it in {CACHE}."
    pages = {}
    with tarfile.open(_fetch(f"{name}.tar.gz", command, advice)) as archive:
        for member in archive:
            _, *path = Path(member.name).parts
            if len(path) > 2 and path[0] == "docs" and path[1] in MANUALS and path[-1].endswith(".txt"):
                pages[member.name] = _prose(archive.extractfile(member).read().decode())
    return [pages[name] for name in sorted(pages) if pages[name]]


def _prose(page: str) -> str:
    """The prose paragraphs of a page in reStructuredText."""
    kept = []
    for paragraph in page.split("\n\n"):
        if len(paragraph) < 120 or not paragraph[0].isupper() or re.search(r"^[=\-~+|]{4}", paragraph, re.M):
            continue  # code and lists are indented, a heading is underlined
        line = " ".join(paragraph.split())
        line = re.sub(r"(?::[\w:.+-]+:)?`+~?([^`<]*?)(?:\s*<[^`]*>)?`+_*", r"\1", line)  # roles and links
        line = re.sub(r"(\w)_(?=\W)", r"\1", line)
        kept.append(line.replace("::", ":").replace("*", ""))
    return "\n\n".join(kept)


def dictionary() -> str:
    """Definitions and quotations of GCIDE, an English dictionary (GPL), one per line, in ASCII."""
    command = ["apt-get", "download", "-q", GCIDE]
    advice = f"Download the package {GCIDE} of Debian and put it in {CACHE}."
    data = _member(_fetch(f"{GCIDE}_*.deb", command, advice), "data.tar.xz")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        name = next(n for n in archive.getnames() if n.endswith("gcide.dict.dz"))
        text = gzip.decompress(archive.extractfile(name).read()).decode(errors="replace")
    kept = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("   "):
            paragraph = paragraph.partition("\n")[2]  # drop the headword, its pronunciation and origin
        line = re.sub(r"\[[^\]]*\]|--[A-Z].*|\{|\}|^\W*(\d+\.|\([a-z]\))", "", " ".join(paragraph.split()))
        line = " ".join(line.split())
        if len(line) > 40 and line.isascii() and line[0].isupper() and line[-1] in ".!?" and "\\" not in line:
            kept.append(line)
    return "\n".join(kept)


def _member(archive: Path, name: str) -> bytes:
    """A file in a Debian package, which is an `ar` archive."""
    data, offset = archive.read_bytes(), 8
    while offset < len(data):
        found = data[offset : offset + 16].decode().strip(" /")
        size = int(data[offset + 48 : offset + 58])
        if found == name:
            return data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise ValueError(f"{archive.name}: contains no {name}")
