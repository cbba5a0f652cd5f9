"""Pages name files that are there."""

import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {  # other programs' files, and names of no file
    *("vllm/config/lora.py", "server/text_generation_server/adapters/lora.py"),
    *("convert_lora_to_gguf.py", "my_script.py", "alphaedit_peft/cli/NAME_command.py"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])[\w/.-]+\.py\b", text)) - ELSEWHERE
    roots = (ROOT, ROOT / "alphaedit_peft", ROOT / "docs")
    assert [name for name in sorted(named) if not any((r / name).is_file() for r in roots)] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
