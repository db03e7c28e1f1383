"""The map in docs/architecture.svg has the folders that there are, and the page names files that there are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markdown_blocks import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
MAP = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
PARTS = ("serve", "runtime", "compile", "kernels")


def test_map_has_every_folder_and_no_other() -> None:
    drawn = [box.attrib["data-folder"] for box in MAP.iter() if "data-folder" in box.attrib]
    rooms = [f"{part}/{path.name}" for part in PARTS for path in (ROOT / part).iterdir() if {*path.glob("*.[pj][ys]")}]
    assert sorted(drawn) == sorted([*PARTS, *rooms])


def test_every_box_of_the_map_is_labelled() -> None:
    boxes = [box.attrib["data-folder"] for box in MAP.iter() if "data-folder" in box.attrib]
    labels = [text.text.rstrip("/") for text in MAP.iter() if text.get("class") in ("name", "label") and text.text]
    assert labels == [name.split("/")[-1] for name in boxes]


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:serve|runtime|compile|kernels|tests)/[\w/.]*)`", PAGE))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_way_of_a_request_has_ten_lines_that_each_name_a_file() -> None:
    way = PAGE.split("## One request's way")[1].split("\n## ")[0]
    lines = re.split(r"^(\d+)\. ", way, flags=re.MULTILINE)[1:]
    assert [int(number) for number in lines[::2]] == [*range(1, 11)]
    assert all(re.search(r"`\w+/[\w/]+\.py`", line) for line in lines[1::2])
