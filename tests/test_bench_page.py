"""The report: one file that needs nothing else, with a plot of everything that was measured, drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the report needs matplotlib, of the bench extra")

from fastattn.bench import figures, page, results
from fastattn.bench.results import Row
from fastattn.bench.scenario import Case, Shape

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WHERE = results.Environment("2026-01-01", "A CPU <1>", "avx2", 2, "2.13", "3.7", "0.1", "abc")


def some_rows() -> list[Row]:
    """A sweep, a suite of one length with goals, ceilings, and a peer that cannot."""
    rows = []
    for name, rate in (("fma", {"tflops": 0.2}), ("read", {"gb_per_s": 30.0})):
        case = Case("ceilings", name, Shape(1, 1, 0, 0, 0))
        rows.append(results.make_row(WHERE, case, "machine", "forward", status="ok", **rate))

    def timed(suite: str, scenario: str, variant: str, length: int, direction: str, seconds: float) -> Row:
        case = Case(suite, scenario, Shape(1, 8, length, length, 64))
        base = 2e-3 * (length / 512) ** 2
        return results.make_row(
            WHERE, case, variant, direction, status="ok", median_s=seconds, p20_s=seconds, p80_s=seconds, samples=3,
            ratio=base / seconds, baseline="sdpa", tflops=0.1, gb_per_s=2.0, fraction=0.5, ceiling="fma", peak_gb=0.01,
        )  # fmt: skip

    for length in (512, 1024, 2048):
        for direction in ("forward", "both"):
            base = 2e-3 * (length / 512) ** 2
            rows.append(timed("cpu-causal", "causal", "sdpa", length, direction, base))
            rows.append(timed("cpu-causal", "causal", "fastattn", length, direction, base / 2))
            rows.append(timed("cpu-causal", "causal", "fastattn-without", length, direction, base))
    for scenario in ("window", "documents"):
        rows.append(timed("mask", scenario, "sdpa", 1024, "forward", 8e-3))
        rows.append(timed("mask", scenario, "fastattn", 1024, "forward", 2e-3))
    refused = Case("mask", "window", Shape(1, 8, 1024, 1024, 64))
    rows.append(results.make_row(WHERE, refused, "flex", "forward", status="cannot", note="<no> & never"))
    return rows


class Structure(HTMLParser):
    """What is open and closed, and everything that a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "rect", "use", "circle", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.figures += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results.write(folder / "cpu.csv", some_rows())
    return page.write(folder)


def test_it_is_whole_and_needs_nothing_else(written: Path) -> None:
    text = written.read_text()
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    assert structure.fetched == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert structure.figures == 3  # roofline, causal against length, masks
    assert figures.INK not in text and figures.GRID not in text


def test_it_shows_what_the_rows_say(written: Path) -> None:
    text = written.read_text()
    assert "A CPU &lt;1&gt;" in text and "&lt;no&gt; &amp; never" in text
    assert "2.00×" in text and "4.00×" in text
    assert "causal forward, float32" in text and "3 of 3" in text  # a goal, met at every length
    assert "causal against our own without it" in text
    assert "200 GFLOP/s" in text and "30.0 GB/s" in text
    assert "50% fma, 10.0 MB" in text


def test_no_name_is_defined_twice_within_a_figure(written: Path) -> None:
    for one in re.findall(r"<svg.*?</svg>", written.read_text(), flags=re.S):
        names = re.findall(r'\sid="([^"]+)"', one)
        assert len(names) == len(set(names))
        assert set(re.findall(r"url\(#([^)]+)\)", one)) <= set(names)
        assert set(re.findall(r'xlink:href="#([^"]+)"', one)) <= set(names)


def test_without_rows(tmp_path: Path) -> None:
    assert "No rows yet" in page.write(tmp_path).read_text()


@pytest.mark.parametrize(
    ("threshold", "measured", "expected"), [("≥ 2.00x", 2.0, 50), ("≥ 2.00x", 8.0, 100), ("≥ 2.00x", 1.0, 25),
                                            ("≤ 10.0 us", 5.0, 75), ("≤ 1.00%", 0.02, 25), ("≤ 10.0 us", -1.0, 100)]
)  # fmt: skip
def test_places_on_a_strip(threshold: str, measured: float, expected: float) -> None:
    from fastattn.bench.goals import Outcome

    blank = dict.fromkeys(Outcome.__dataclass_fields__, "")
    assert page._place(Outcome(**{**blank, "threshold": threshold, "measured": measured})) == pytest.approx(expected)


def browse(target: Path, *options: str, folder: Path) -> str:
    """What the browser prints about a page."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, target.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Writes into the page how every plot was drawn: its box, how many of its marks have one, whether its text can be seen.
PROBE = """<script>
for (const svg of document.querySelectorAll("figure.plot svg")) {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("path, use")].filter(e => e.getBoundingClientRect().width > 0).length;
  const texts = [...svg.querySelectorAll("text")];
  const seen = texts.filter(e => getComputedStyle(e).fill !== getComputedStyle(document.body).backgroundColor).length;
  svg.setAttribute("data-probe", [box.width, box.height, marks, texts.length, seen].map(Math.round).join(" "));
}
document.documentElement.setAttribute("data-overflow", document.documentElement.scrollWidth - innerWidth);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 480])
def test_a_browser_draws_every_plot(written: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(written.read_text().replace("</body>", PROBE))
    dom = browse(probed, "--dump-dom", f"--window-size={width},900", folder=tmp_path)
    probes = [list(map(int, found.split())) for found in re.findall(r'data-probe="([^"]+)"', dom)]
    assert len(probes) == 3
    for box_width, box_height, marks, texts, seen in probes:
        assert box_width > 0.6 * width and box_height > 50
        assert marks > 10
        assert texts == seen > 5
    (overflow,) = re.findall(r'data-overflow="(-?\d+)"', dom)
    assert int(overflow) <= 0, "the page is wider than its window"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_has_the_colours_of_the_plots(written: Path, tmp_path: Path, dark: bool) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    shot = tmp_path / "report.png"
    mode = ("--force-dark-mode",) if dark else ()
    browse(written, f"--screenshot={shot}", "--window-size=1200,2400", *mode, folder=tmp_path)
    with image.open(shot) as picture:
        pixels = picture.convert("RGB")
    assert pixels.size == (1200, 2400)
    corner = pixels.getpixel((5, 5))
    assert (sum(corner) < 200) == dark
    counts = {colour: count for count, colour in pixels.getcolors(1 << 24)}
    for variant in ("fastattn", "sdpa"):
        red, green, blue = (int(figures.COLOURS[variant][i : i + 2], 16) for i in (1, 3, 5))
        assert counts.get((red, green, blue), 0) > 40, f"nothing of {variant} was drawn"
