"""Hands: every grasp poses both hands alike, and the hand lies where it is told to grip."""

import numpy as np
import pytest

from examples.kitchen.geom import Material
from examples.kitchen.hand import FOREARM, GRASPS, UPPER_ARM, Grip, elbow, hand_frame, hand_parts, posed


@pytest.mark.parametrize("grasp", GRASPS)
def test_the_left_hand_is_the_mirrored_right_hand(grasp):
    right, left = (posed(side, grasp)[0] for side in ("right", "left"))
    assert np.allclose(right.min(0) * [-1, 1, 1], [left[:, 0].max(), left[:, 1].min(), left[:, 2].min()], atol=4e-3)


@pytest.mark.parametrize("grasp", GRASPS)
def test_a_posed_hand_is_as_long_as_a_hand(grasp):
    vertices, _ = posed("right", grasp)
    assert 0.10 < np.ptp(vertices[:, 2]) < 0.22


def test_a_fist_is_shorter_than_a_flat_hand():
    assert np.ptp(posed("right", "fist")[0][:, 2]) < 0.8 * np.ptp(posed("right", "flat")[0][:, 2])


def test_the_hand_frame_points_fingers_and_palm_as_asked():
    frame = hand_frame((0, 1, 0), (0, 0, -1))
    assert np.allclose(frame @ [0, 0, -1], [0, 1, 0]) and np.allclose(frame @ [0, -1, 0], [0, 0, -1])


def test_the_elbow_keeps_the_lengths_of_both_bones():
    shoulder, wrist = np.array([0.2, 0.0, 1.2]), np.array([0.1, 0.35, 1.0])
    joint = elbow(shoulder, wrist, "right")
    assert np.isclose(np.linalg.norm(joint - wrist), FOREARM)
    assert np.isclose(np.linalg.norm(joint - shoulder), UPPER_ARM)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_hand_closes_around_its_grip_point(side):
    point = np.array([0.05, 0.3, 1.0])
    grip = Grip(point, np.array([-0.3, 0.9, -0.2]), np.array([-0.9, -0.4, 0]), "wrap", 0.02, 0.35, 0.085)
    hand, forearm = hand_parts(side, grip, np.array([0.2, -0.2, 1.2]), Material((0.8, 0.6, 0.5)))
    assert np.linalg.norm(hand.vertices - point, axis=1).min() < 0.04
    assert hand.name == forearm.name == f"hand_{side}"
