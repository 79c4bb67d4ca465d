"""The documentation site: no warnings, usable offline, no dead links, formulas, all public names."""

import html.parser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import sukhops

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make .venv/docs")
ROOT = Path(__file__).parent.parent
NAMES = [
    f"{module.__name__}.{name}"
    for module in (sukhops, sukhops.nn, sukhops.losses, sukhops.pairs)
    for name in module.__all__
    if name not in ("losses", "nn", "pairs", "reference", "testing")
]


class Page(html.parser.HTMLParser):
    """Links, loaded files and anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_no_dead_links(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                dead.append((path.name, link))
    assert dead == []


def test_pages_load_nothing_from_the_network(pages):
    loaded = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert loaded == set()


def test_formulas_are_typeset(pages):
    assert not [path.name for path, page in pages.items() if 'class="arithmatex"' in page.text]
    operations = {path.stem: page for path, page in pages.items() if path.parent.name == "operations"}
    assert (
        len(operations) == 7 and [name for name, page in operations.items() if "<math" not in page.text] == []
    )


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_an_entry(name, pages):
    entries = [page for path, page in pages.items() if path.parent.name == "api" and name in page.ids]
    assert len(entries) == 1


def test_search_index_contains_every_page(site, pages):
    index = (site / "search" / "search_index.json").read_text()
    named = set(re.findall(r'"location":"([^"#]+)', index))
    assert {str(path.relative_to(site)) for path in pages} <= named


@pytest.mark.parametrize("width", [1280, 400])
def test_start_page_in_a_browser(width, site, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    image = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "start.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},1000",
    ]
    command = [chromium, *options, f"--screenshot={shot}", (site / "index.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    gray = image.imread(shot)[..., :3].mean(2)  # [1000, width]
    assert gray.shape == (1000, width)
    body = gray[120:]
    assert body.mean() > 0.8, "the page should be light"
    lines = (body < 0.4).any(1)
    assert 0.2 < lines.mean() < 0.95, "expected lines of text with space between them"
    assert (body[:, -4:] > 0.9).mean() > 0.95, "text overflows the right edge"
