"""Boxes as masks."""

import torch

from lego_pipeline.data.boxes import box_mask


def test_a_mask_holds_every_cell_that_a_box_touches() -> None:
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[0:2, 2:5] = True
    assert torch.equal(box_mask([{"x0": 0.3, "y0": 0.0, "x1": 0.6, "y1": 0.26}], 4, 8), expected)


def test_edges_on_the_grid_add_no_cell() -> None:
    assert box_mask([{"x0": 0.25, "y0": 0.5, "x1": 0.5, "y1": 1.0}], 4, 4).nonzero().tolist() == [[2, 1], [3, 1]]


def test_a_mask_is_the_union_of_its_boxes() -> None:
    left, right = ({"x0": x, "y0": 0.0, "x1": x + 0.25, "y1": 1.0} for x in (0.0, 0.5))
    assert box_mask([left, right], 1, 4).tolist() == [[True, False, True, False]]
    assert not box_mask([], 2, 2).any()
