"""Writes a package index (PEP 503) for a folder of wheels, one for each thing they are built for:

    python release/index.py dist site --url https://example.org/wheels
    pip install fastattn --index-url .../site/cu130/

`site/cu130/fastattn/index.html` lists the wheels of fastattn whose version ends in +cu130, `site/fastattn/index.html`
all of them, each with its SHA-256, which pip holds the download to.  Without --url the wheels are copied beside their
lists.  A mirror of PyPI for torch goes into `--extra-index-url`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

from packaging.utils import canonicalize_name, parse_wheel_filename


def write(wheels: Iterable[Path], site: Path, url: str | None = None) -> list[Path]:
    """Write the lists; the pages, in the order of their paths.

    Raises InvalidWheelFilename (packaging) for a file that is not named as a wheel is.
    """
    projects: dict[Path, dict[str, str]] = {}
    for wheel in sorted(wheels):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        line = _line(wheel, f"{url.rstrip('/')}/" if url else "../")
        for root in {Path(), Path(version.local or "")}:
            page = site / root / canonicalize_name(name) / "index.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            projects.setdefault(page, {})[wheel.name] = line
            if url is None:
                shutil.copy2(wheel, page.parent.parent)
    pages = {page: [lines[name] for name in sorted(lines)] for page, lines in projects.items()}
    for root in {page.parent.parent for page in projects}:
        names = sorted(page.parent.name for page in projects if page.parent.parent == root)
        pages[root / "index.html"] = [f'<a href="{name}/">{name}</a>' for name in names]
    for page, lines in pages.items():
        body = "<br>\n".join(lines)
        page.write_text(f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>Wheels</title>\n{body}\n')
    return sorted(pages)


def _line(wheel: Path, folder: str) -> str:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(about).decode().splitlines()
    python = next((line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Python: ")), "")
    # "+" is a blank in some servers' addresses
    link = f"{folder}{quote(wheel.name)}#sha256={digest}"
    return f'<a href="{link}" data-requires-python="{escape(python)}">{escape(wheel.name)}</a>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder of wheels")
    parser.add_argument("site", type=Path, help="where to write")
    parser.add_argument("--url", help="address of the folder the wheels themselves are published in")
    options = parser.parse_args()
    found = list(options.wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"no wheel in {options.wheels}")
    for page in write(found, options.site, options.url):
        print(page)


if __name__ == "__main__":
    main()
