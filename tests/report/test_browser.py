"""Pages in a real browser: nothing to complain of, the search works, and nothing runs over."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest

from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.report import pack_page
from tests.pack.conftest import make_pack
from tests.report.test_page import HOSTILE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
    pytest.mark.slow,
]
COUNT = 40


@pytest.fixture
def browse(tmp_path):
    """Open a page: (DOM after its script has run, what the console said)."""

    def browses(text: str, fragment: str = "", *options: str) -> tuple[str, str]:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                *(BROWSER, "--headless=new", "--disable-gpu", "--dump-dom"),
                *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
                *(["--no-sandbox"] if os.geteuid() == 0 else []),
                *options,
                path.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, "\n".join(said)

    return browses


@pytest.fixture(scope="module")
def page() -> str:
    """A page of many edits, the last of them hostile."""
    names = [f"{'pqrstuvw'[i % 8]}{'klmno'[i // 8]}" for i in range(COUNT)]  # in no id
    edits = [Edit(f"Mr {name}", "{} lives in", f"Town {name}", "Village") for name in names]
    edits[-1] = Edit(HOSTILE, "{} lives in", HOSTILE)
    records = [EditRecord(edit, i, "own", 0, "", 0.1, 0.9) for i, edit in enumerate(edits)]
    return pack_page(make_pack(rows=COUNT, records=records))


def rows(dom: str) -> list[str]:
    """Opening tags of the rows of the table of edits."""
    edits = re.search(r'<div class="searched">.*?</table>', dom, re.DOTALL)[0]
    return re.findall(r"<tr[^>]*>", edits.partition("<tbody>")[2])


def test_the_edits_are_there_and_the_console_is_silent(browse, page):
    dom, said = browse(page)
    assert said == ""
    assert rows(dom) == ["<tr>"] * COUNT
    assert f"<output>{COUNT} in all</output>" in dom
    assert '<p class="search">' in dom  # no longer hidden
    assert "&lt;script&gt;alert(" in dom
    assert dom.count("<script") == 1


@pytest.mark.parametrize(
    ("words", "left"), [("town", COUNT - 1), ("PK  mr", 1), ("<script>", 1), ("nobody", 0)]
)
def test_the_search_leaves_the_rows_with_all_words(browse, page, words, left):
    dom, said = browse(page, f"#search={quote(words)}")
    assert said == ""
    assert rows(dom).count("<tr>") == left
    assert f"<output>{left} of {COUNT}</output>" in dom


def test_a_broken_fragment_does_no_harm(browse, page):
    dom, said = browse(page, "#search=%E0%A4%A")
    assert said == ""
    assert rows(dom).count("<tr>") == 0


def test_the_policy_stops_a_script_that_got_in(browse, page):
    spoilt = page.replace("</main>", '<script>document.title = "taken"</script></main>')
    dom, said = browse(spoilt)
    assert "<title>taken</title>" not in dom
    assert "Content Security Policy" in said


@pytest.mark.parametrize("width", [500, 1200])  # the narrowest window that it opens, and a wide one
def test_nothing_is_wider_than_the_screen(browse, page, width):
    """A script of the test's own, let in by the policy, writes the widths into the title."""
    probe = "document.title = document.documentElement.scrollWidth + ' ' + innerWidth;"
    open_page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    probed = open_page.replace("</body>", f"<script>{probe}</script></body>")
    dom, _ = browse(probed, "", f"--window-size={width},900")
    wide, inner = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert wide <= inner
