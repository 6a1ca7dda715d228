"""Meshes: shapes have the size that was asked for, and their normals point out."""

import numpy as np
import pytest

from examples.kitchen.geom import Material, align, box, ellipsoid, lathe, rotation, spline, tube

GREY = Material((0.5, 0.5, 0.5))
SHAPES = {
    "box": box((-1, -1, -1), (1, 1, 1), GREY),
    "cylinder": lathe([(0, -1), (1, -1), (1, 1), (0, 1)], GREY),
    "ellipsoid": ellipsoid(1, 0.5, 2, GREY),
    "tube": tube([(0, 0, -1), (0, 0, 0), (0, 0, 1)], 0.5, GREY),
}


@pytest.mark.parametrize("name", SHAPES)
def test_normals_of_a_closed_shape_point_away_from_its_middle(name):
    part = SHAPES[name]
    assert ((part.vertices - part.vertices.mean(0)) * part.normals).sum(1).min() > -1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_normals_have_length_one(name):
    assert np.allclose(np.linalg.norm(SHAPES[name].normals, axis=1), 1)


@pytest.mark.parametrize("name", SHAPES)
def test_faces_name_vertices_that_are_there(name):
    part = SHAPES[name]
    assert part.faces.min() == 0 and part.faces.max() == len(part.vertices) - 1


def test_an_ellipsoid_has_its_half_axes():
    assert np.allclose(np.abs(SHAPES["ellipsoid"].vertices).max(0), [1, 0.5, 2], atol=0.03)


def test_a_positive_turn_about_z_takes_x_to_y():
    assert np.allclose(rotation("z", 90) @ [1, 0, 0], [0, 1, 0])


@pytest.mark.parametrize("end", [(0, 1, 0), (0.6, 0.64, -0.48), (-1, 0, 0)])
def test_align_takes_one_direction_to_the_other(end):
    assert np.allclose(align((1, 0, 0), end) @ [1, 0, 0], end)


def test_a_moved_part_keeps_its_place_in_the_pattern():
    part = SHAPES["box"]
    assert part.moved(rotation("x", 30), (1, 2, 3)).texture is part.texture


def test_a_spline_passes_through_its_points():
    points = np.array([(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 1)], float)
    assert np.allclose(spline(points, 5)[::5], points)
