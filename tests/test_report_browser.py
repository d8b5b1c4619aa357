"""The pages in a real browser without a window, as wide as a desk and as narrow as a phone.

Debian's `chromium`, or Chrome: whatever of them is installed, else `LANCE_BROWSER`.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner
from report_rows import RECORD, on_machine, write_benchmark, write_run

from lance_device.serve import RunPages
from lance_host.cli import cli

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("LANCE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
NO_BROWSER = (
    "no chromium and no Chrome: nobody looked at the pages of lance-host report and --serve; apt-get install"
    " chromium, or name a browser in LANCE_BROWSER"
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
WIDTHS = {"desktop": 1280, "phone": 390}
SMALLEST_TEXT_PX = 9.5  # of a figure on a phone
READABLE = 4.5  # contrast of text and ground: WCAG 2.1, success criterion 1.4.3
SETTLED_MS = 2000

# What a person with a ruler would find.  A frame has exactly the width that is asked for, a window need not.
MEASURE = r"""
const frame = document.getElementById("page");
frame.onload = () => {
  const inner = frame.contentDocument, view = frame.contentWindow, root = inner.documentElement;
  const light = (text) => {
    const [r, g, b] = text.match(/[\d.]+/g).map(Number)
      .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = view.getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (element) => {
    const style = view.getComputedStyle(element);
    const [a, b] = [element.closest("figure svg") ? style.fill : style.color, ground(element)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  inner.querySelectorAll("details").forEach((d) => { d.open = true; });
  const shown = [...inner.querySelectorAll("body *")].filter((e) => e.getClientRects().length);
  const texts = [...inner.querySelectorAll("figure svg text")].filter((e) => e.textContent.trim());
  const words = shown.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const name = (e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}`;
  const outside = (e) => {
    const box = e.getBoundingClientRect(), picture = e.closest("svg").getBoundingClientRect();
    return box.left < picture.left - 2 || box.right > picture.right + 2 || box.bottom > picture.bottom + 2;
  };
  const size = (e) => {
    const svg = e.closest("svg"), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return parseFloat(view.getComputedStyle(e).fontSize) * scale;
  };
  document.getElementById("found").textContent = JSON.stringify({
    id: inner.body.id,
    width: view.innerWidth,
    scroll: root.scrollWidth,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    figures: inner.querySelectorAll("figure").length,
    pictures: [...inner.querySelectorAll("figure > svg")].filter((e) => e.clientHeight > 100).length,
    beyond: shown.filter((e) => e.getBoundingClientRect().right > view.innerWidth + 1).map(name),
    cut: texts.filter(outside).map(name),
    wrapped: [...inner.querySelectorAll(".results td:not(:first-child) > span")]
      .filter((e) => e.getClientRects().length > 1).map(name),
    smallest: Math.min(...texts.map(size)),
    pale: words.filter((e) => contrast(e) < %READABLE%).map(name),
  });
};
frame.srcdoc = document.getElementById("source").textContent;
"""


def measured(page, width, folder):
    """What the browser found of a page in a frame of this width."""
    outer = folder / f"{width}.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe id="page" width="{width}" height="800" style="border:0">'
        f'</iframe><template id="unused"></template><textarea id="source" hidden>{html.escape(page)}</textarea>'
        f'<pre id="found"></pre><script>{MEASURE.replace("%READABLE%", str(READABLE))}</script>'
    )
    words = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--virtual-time-budget={SETTLED_MS}", f"--window-size={width + 100},900", outer.as_uri(),
    )  # fmt: skip
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(\{.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def host_page(folder):
    """Of everything at once: two boards, no record, throttling, a long name, a benchmark."""
    long_name = "a-run-whose-name-somebody-made-much-longer-than-any-column-of-a-phone"
    folders = (
        write_run(folder / long_name),
        write_run(folder / "bp", "bp", throttled="0x4", scales=(1.0, 1.5)),
        write_run(folder / "elsewhere", "asi", record=on_machine(board="Raspberry Pi 5 Model B Rev 1.0")),
        write_run(folder / "copied", "hosvd", record=None),
        write_benchmark(folder / "bench", layers=range(1, 11)),
    )
    pytest.importorskip("matplotlib", reason="lance-host report needs matplotlib")
    out = folder / "report.html"
    result = CliRunner().invoke(cli, ["report", *map(str, folders), "-o", str(out)])
    assert result.exit_code == 0, result.output
    return out.read_text()


def device_page(folder):
    run = write_run(folder / "run", record={**RECORD, "status": "running"}, throttled="0x4")
    return RunPages(run).page().decode()


@pytest.fixture(scope="module", params=[host_page, device_page], ids=["host", "device"])
def page(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_a_page_fits_is_legible_and_asks_no_network(page, width, tmp_path):
    found = measured(page, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["beyond"] == []
    assert found["cut"] == []
    assert found["pale"] == []
    assert found["wrapped"] == []
    assert found["requests"] == []
    assert found["figures"] == found["pictures"] >= 6
    assert found["smallest"] >= SMALLEST_TEXT_PX


def test_a_name_of_a_folder_runs_nothing(tmp_path):
    pytest.importorskip("matplotlib", reason="lance-host report needs matplotlib")
    name = 'b"><img\tsrc=x\tonerror=document.body.id="ran">'
    out = tmp_path / "report.html"
    result = CliRunner().invoke(cli, ["report", str(write_benchmark(tmp_path / name)), "-o", str(out)])
    assert result.exit_code == 0, result.output
    found = measured(out.read_text(), 1280, tmp_path)
    assert found["id"] == ""
    assert found["requests"] == []


def test_the_ruler_finds_what_is_wrong(tmp_path):
    """A page with every fault that the test above looks for."""
    bad = (
        '<!doctype html><body style="margin:0"><p style="width:2000px;color:#bbb">wide and pale</p>'
        '<figure><svg viewBox="0 0 1000 500" width="300" height="150"><text x="990" y="90">cut off</text></svg>'
        '</figure><img src="http://example.invalid/a.png">'
        '<table class="results"><tr><td>run</td><td><span>111.80<br>MiB</span></td></tr></table>'
        "<img src=x onerror='document.body.id=\"ran\"'>"
    )
    found = measured(bad, 390, tmp_path)
    assert found["scroll"] > 390
    assert found["beyond"][0].startswith("P wide")
    assert found["pale"] == ["P wide and pale"]
    assert found["cut"] == ["text cut off"]
    assert found["wrapped"] == ["SPAN 111.80MiB"]
    assert found["smallest"] < SMALLEST_TEXT_PX
    assert "http://example.invalid/a.png" in found["requests"]
    assert found["id"] == "ran"
