"""The pages that are made from code are those that the code makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, str(TOP / "tools/config_docs.py")], capture_output=True, text=True, check=True
    )
    assert made.stdout == (TOP / "docs/configuration.md").read_text(encoding="utf-8")


def test_no_page_waits_to_be_filled_in() -> None:
    pages = [TOP / "README.md", *(TOP / "docs").glob("*.md"), *TOP.glob("egs/*/asr1/README.md")]
    assert [page.name for page in pages if re.search("<!-- [A-Z]+ -->", page.read_text(encoding="utf-8"))] == []


def test_every_local_link_of_the_readme_leads_somewhere() -> None:
    pages = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md")), *sorted(TOP.glob("egs/*/asr1/README.md"))]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 5
    assert [str(page) + " -> " + link for page, link in links if not (page.parent / link).exists()] == []
