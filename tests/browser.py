"""Opens a page in chromium without a window: what the browser made of it, and a picture of it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

INSPECTION = """<script>
const errors = []; addEventListener("error", event => errors.push(event.message), true);
addEventListener("load", () => {
  const box = document.createElement("pre");
  const page = {
    images: [...document.images].map(image => image.complete && image.naturalWidth > 0 && image.alt !== ""),
    rows: [...document.querySelectorAll("table")].map(table => table.tBodies[0].rows.length),
    width: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
    remote: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => name.startsWith("http")),
    links: [...document.querySelectorAll("a[href^='#']")]
      .map(link => document.getElementById(link.hash.slice(1)) !== null),
    errors: errors, scripts: document.scripts.length,
    title: document.title, lang: document.documentElement.lang, text: document.body.innerText,
  };
  box.id = "inspection";
  box.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(page))));
  document.body.append(box);
});</script>"""


def inspect_page(html: str, folder: Path, width: int) -> dict[str, Any]:
    """The page in a window of `width` pixels, as INSPECTION describes it. Its script is the only one to be expected."""
    copy = folder / "copy.html"
    copy.write_text(html + INSPECTION)
    done = _browse(copy, folder, width, "--dump-dom")
    match = re.search(r'<pre id="inspection">([^<]+)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    page: dict[str, Any] = json.loads(base64.b64decode(match[1]))
    assert page["width"][0] <= page["width"][1] <= width, "only tables scroll sideways"
    assert page["remote"] == [] and page["errors"] == [] and page["scripts"] == 1
    return page


def take_screenshot(page: Path, folder: Path, width: int) -> Path:
    """A PNG of the first 2,000 pixels of the page."""
    screenshot = folder / "page.png"
    _browse(page, folder, width, f"--screenshot={screenshot}", "--hide-scrollbars")
    return screenshot


def print_to_pdf(page: Path, folder: Path) -> Path:
    """The page as a PDF."""
    printed = folder / "page.pdf"
    _browse(page, folder, 1000, f"--print-to-pdf={printed}")
    return printed


def _browse(page: Path, folder: Path, width: int, *more: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={folder}/chromium",
             f"--window-size={width},2000"]  # fmt: skip
    return subprocess.run(["chromium", *flags, *more, page.as_uri()], capture_output=True, text=True, timeout=120)
