"""The contact sheet."""

from PIL import Image

from examples.kitchen.sheet import GAP, LABEL, main


def test_the_sheet_holds_the_asked_pairs(tmp_path):
    out = tmp_path / "docs" / "sheet.png"
    assert main(["--out", str(out), "--pairs", "3", "--columns", "2", "--size", "16"]) == 0
    with Image.open(out) as image:
        assert image.size == (2 * (2 * 16 + 2 * GAP) + GAP, 2 * (16 + LABEL + GAP) + GAP)
