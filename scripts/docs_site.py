"""MkDocs hook: pages and plots of the site that lie outside `docs/`."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
PLOTS = "benchmarks/results"
# Links of these pages, and of those in `docs/`, in the repository and on the site.
LINKS = {
    "README.md": {"](docs/": "]("},
    "CONTRIBUTING.md": {"](docs/": "](", "](benchmarks/README.md": "](benchmarks.md"},
    "benchmarks/README.md": {"](../docs/": "](", "](results/": f"]({PLOTS}/"},
}
DOCS_LINKS = {f"](../{PLOTS}/": f"]({PLOTS}/", "](../CONTRIBUTING.md": "](contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and plots."""
    plots = {str(plot.relative_to(ROOT)): None for plot in (ROOT / PLOTS).rglob("*.png")}
    for path, name in {**PAGES, **{plot: plot for plot in plots}}.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links point into the site."""
    path = next((path for path, name in PAGES.items() if name == page.file.src_uri), "")
    for link, on_site in LINKS.get(path, {} if path else DOCS_LINKS).items():
        markdown = markdown.replace(link, on_site)
    return markdown
