"""What is on the page, without a browser."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from disttrain.report import build_page, read_runs
from tests.report.example import SAMPLE, Example, write_example

LARGEST_BYTES = 8_000_000
ODD = [None, True, "nan", "inf", "x", [], {}, [1], {"edges": 1}, -1, 0, 1e308, 10**30, 1e-300, "</script><b>"]


class Reader(HTMLParser):
    """The elements, the text outside scripts and styles, and everything that a browser would load."""

    LOADS = ("src", "href", "data", "action", "poster", "srcset", "background")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._inside = tag
        self.loads += [value or "" for name, value in attrs if name in self.LOADS]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.scripts.append(data)
            return
        self.words.append(data)
        if self._inside in ("h2", "figcaption", "summary"):
            self.headings.append(data.strip())


def page(*folders: Path, title: str | None = None) -> str:
    return build_page(read_runs(list(folders)), title).html


def stored(html: str) -> dict[str, Any]:
    return json.loads(re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', html)[0])


def headings(html: str) -> list[str]:
    return [heading for heading in Reader(html).headings if heading]


def test_one_run_has_every_section(runs: tuple[Path, ...]) -> None:
    html = page(runs[0])
    found = headings(html)
    for name in (
        *("Loss", "Learning", "Gradients", "Stability", "Speed", "Resources", "Events", "Checkpoints", "Settings"),
        *("Samples", "Training and validation loss", "Learning rate", "Batch and noise scale", "Gradient norm"),
        *(
            "Gradient norm: embeddings",
            "Clip units: norm over threshold",
            "Update RMS",
            "Largest attention logit by layer",
        ),
        *(
            "Throughput",
            "Model FLOPs utilisation (MFU)",
            "Time of a step",
            "Step times of all ranks",
            "Step time without waiting, by rank",
        ),
        *("Device memory", "Goodput", "Where the wall time went", "Time line", "Profile", "Who owns which parameter"),
    ):
        assert name in found, name
    text = " ".join(Reader(html).words)
    for words in ("1 value is not finite", "most lost: restart, 8 min", "lost rank", "meteor", "node-07", "muonclip"):
        assert words in text


def test_old_runs_leave_out_what_they_lack(runs: tuple[Path, ...]) -> None:
    html = page(runs[2])
    found = headings(html)
    assert "Training and validation loss" in found
    assert {"Events", "Resources", "Time of a step", "Profile", "Environment"}.isdisjoint(found)
    assert "recorded no time of day" in html
    assert 'data-axis="time" aria-pressed="false" disabled' in html
    assert "n/a" in html


def test_several_runs(runs: tuple[Path, ...], tmp_path: Path) -> None:
    again = shutil.copytree(runs[0], tmp_path / "again")
    html = page(runs[0], again, runs[1], title="A & B")
    reader = Reader(html)
    assert "<h1>A &amp; B</h1>" in html
    assert html.count('class="run"') == 3
    text = "".join(reader.words)
    assert "gpt-124m-muon (muon)" in text
    assert "gpt-124m-muon (again)" in text
    assert text.index("Settings that differ") < text.index("optim.lr") < text.index("All settings")
    # A run has one colour in every chart: that of its dot.
    colours = re.findall(r'data-run="(\d)"[^>]*><i class="dot" style="background:(#\w+)"', html)
    assert len(set(colours)) == 3
    for chart in stored(html)["charts"]:
        for trace, run in zip(chart["data"], chart["runs"], strict=True):
            if run >= 0 and trace["type"] == "scatter":
                colour = trace["line"]["color"] if "line" in trace else trace["marker"]["color"]
                assert (str(run), colour) in colours


def test_nothing_of_a_run_becomes_markup(runs: tuple[Path, ...], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "run")
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%{x}"
    config = json.loads((folder / "config.json").read_text())
    config["run"]["name"] = config["data"]["path"] = config["optim"][evil] = evil
    (folder / "config.json").write_text(json.dumps(config))
    event = {"unix_seconds": 1_750_000_100.0, "step": 3, "kind": evil, "text": evil}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    (folder / "status.json").write_text(json.dumps({"state": evil, "step": 3, "lost_seconds": {evil: 3.0}}))
    row = {"step": 5000, "tokens": 9, "loss": 1.0, f"grad_norm/{evil}": 1.0, f"lr/{evil}": 1.0}
    rows = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
    (folder / "metrics.jsonl").write_text(f"{rows}\n{json.dumps(row)}\n")
    for html in (page(folder, title=evil), page(folder, runs[1])):
        reader = Reader(html)
        assert "img" not in reader.elements
        assert reader.elements.count("script") == 3
        assert reader.elements.count("b") == 0
        assert evil in "".join(reader.words)
        for chart in stored(html)["charts"]:
            names = [trace.get("name", "") for trace in chart["data"]]
            shown = [text for trace in chart["data"] for text in trace.get("text", [])]
            assert not [text for text in (*names, *shown) if "<" in text]
    assert SAMPLE in "".join(Reader(page(folder)).words)


def test_nothing_is_loaded(runs: tuple[Path, ...]) -> None:
    html = page(*runs)
    reader = Reader(html)
    assert not [load for load in reader.loads if not load.startswith(("#", "data:,"))]
    assert {"iframe", "object", "embed", "form", "base"}.isdisjoint(reader.elements)
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL)))
    assert "default-src 'none'" in html
    ours = reader.scripts[-1]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(", ours)
    assert "showSendToCloud: false" in ours


def test_three_long_runs_stay_small(tmp_path: Path) -> None:
    """As many rows as a month of training writes, from a hundred that come again and again."""
    folder = write_example(tmp_path / "a", Example("a", rows=100, units=8))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    block = [row for row in map(json.loads, lines[:-1]) if "loss" in row]
    pairs = enumerate(block * 200)
    long = "".join(
        json.dumps(row | {"step": n, "tokens": 9**6 * n, "unix_seconds": 1e9 + n}) + "\n" for n, row in pairs
    )
    (folder / "metrics.jsonl").write_text(long)
    [run] = read_runs([folder])
    html = build_page([run, replace(run, label="b"), replace(run, label="c")]).html
    assert len(html.encode()) < LARGEST_BYTES
    longest = max(len(axes["step"]["bdata"]) for chart in stored(html)["charts"] for axes in chart["axes"] if axes)
    assert longest / 4 * 3 / 4 <= 1001
    assert re.search(r"Thinned from 20,000 to \d+ points; the lowest and highest of neighbours are kept", html)


def test_plotly_knows_every_attribute(runs: tuple[Path, ...]) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for folders in (runs[:1], runs[1:2], runs[2:], runs):
        for chart in stored(page(*folders))["charts"]:
            assert len(chart["data"]) == len(chart["axes"]) == len(chart["runs"])
            graph_objects.Figure(data=chart["data"], layout=chart["layout"])


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5])
@pytest.mark.filterwarnings("error")
def test_odd_values_anywhere_break_nothing(share: float, tmp_path: Path) -> None:
    """Any value of any file may be of another type, not finite, huge or missing."""
    chance = random.Random(share)

    def odd(value: Any) -> Any:
        if chance.random() < share:
            return chance.choice(ODD)
        if isinstance(value, dict):
            return {key: odd(inner) for key, inner in value.items() if chance.random() > share}
        return [odd(inner) for inner in value] if isinstance(value, list) else value

    folder = write_example(tmp_path / "run", Example(rows=60, units=5))
    whole = {"step": 4, "tokens": 4, "loss": 4.0}
    for attempt in range(6):
        run = shutil.copytree(folder, tmp_path / f"run{attempt}")
        for file in run.rglob("*.json"):
            file.write_text(json.dumps(odd(json.loads(file.read_text()))))
        for file in run.rglob("*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
            file.write_text("".join(json.dumps(odd(line)) + "\n" for line in lines) + json.dumps(whole) + "\n")
        assert len(page(run)) > 10**6
        assert len(page(run, folder)) > 10**6


def test_a_run_that_goes_on_is_as_far_as_its_rows(runs: tuple[Path, ...], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "run")
    (folder / "status.json").write_text('{"state": "running", "step": 0}')
    text = " ".join(" ".join(Reader(page(folder)).words).split())
    assert "running" in text
    assert "Step 3,990 of 4,000, 5.2 s left" in text
    assert "Wall time 42 min" in text
