"""The template: it shows any text as text, lets no stranger's script run, and loads nothing."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from alphaedit_peft.report import Markup, Section, facts, page, paragraph, source, table
from alphaedit_peft.report.page import escaped

HOSTILE = '</td></table><script>alert("x")</script><img src=x onerror=alert(1)> & $title ${x} $'


class Tags(HTMLParser):
    """The tags of a page, its text, and whether every opened tag is closed again."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.names, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def everywhere(text):
    cells = table([text, f">{text}"], [[text, text]], search=text)
    pieces = (cells, facts([(text, text)]), paragraph(text), source(text))
    return page(text, [Section(text, Markup("".join(pieces)))], text)


def test_hostile_text_stays_text_in_every_place():
    harmless, found = Tags(everywhere("x")), Tags(everywhere(HOSTILE))
    assert found.names == harmless.names
    assert found.open == []
    assert found.names.count("script") == 1
    assert "".join(found.text).count(HOSTILE) == 14


def test_the_policy_lets_only_the_pages_own_script_run():
    text = everywhere(HOSTILE)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_page_names_no_other_file():
    text = page("t", [Section("s", table(["a"], [["b"]], search="Find"))])
    assert not re.search(r"https?:|@import|url\(|src=", text)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,", "#1-s"]


def test_sections_are_listed_in_order_and_equal_headings_keep_their_own_anchor():
    text = page("t", [Section("Two words", paragraph("a")), Section("Two words", paragraph("b"))])
    assert re.findall(r'<a href="#([^"]*)"', text) == ["1-two-words", "2-two-words"]
    assert re.findall(r'<section id="([^"]*)"', text) == ["1-two-words", "2-two-words"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\N{EN DASH}"),
        (True, "yes"),
        (3, "3"),
        (0.123456, "0.1235"),
        ("a\x00b\x1b\ud800c\n", "a\ufffdb\ufffd\ufffdc\n"),
        ("\u06a9\u200c\U0001f469\u200d\U0001f52c", "\u06a9\u200c\U0001f469\u200d\U0001f52c"),
        (Markup("<b>x</b>"), "<b>x</b>"),
    ],
)
def test_what_is_shown_of_a_value(value, shown):
    assert escaped(value) == shown
    shown.encode("utf-8")


def test_a_row_that_does_not_fit_its_columns_is_an_error():
    with pytest.raises(ValueError, match="longer"):
        table(["a", "b"], [["only one"]])


def test_a_table_of_few_columns_does_not_stack():
    assert "stacked" not in table(["a"] * 4, [])
    assert "stacked" in table(["a"] * 5, [])
