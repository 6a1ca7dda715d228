"""Triangle meshes from a few primitives: box, lathe, ellipsoid, tube along a path, prism.

A `Part` is one mesh with one material and the name under which the part map and the boxes know it. Lengths are metres,
angles degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}


@dataclass
class Material:
    """Surface of a part; colours are linear RGB in 0 to 1."""

    colour: tuple[float, float, float]
    second: tuple[float, float, float] | None = None  # the pattern's other colour
    pattern: str = "plain"  # a name in raytrace.PATTERNS
    scale: float = 1.0  # pattern repeats, relative to the pattern's own size
    gloss: float = 0.0  # 0 matt to 1 shiny
    glow: float = 0.0  # light given off, in multiples of the colour


@dataclass
class Part:
    """One mesh: V vertices, F faces."""

    vertices: np.ndarray  # (V, 3) float, metres
    faces: np.ndarray  # (F, 3) int, indices of vertices
    normals: np.ndarray  # (V, 3) float, unit length
    texture: np.ndarray  # (V, 3) float, the point in the solid pattern; stays when the part moves
    material: Material
    name: str = "world"

    def moved(self, rotation: np.ndarray | None = None, offset=None, name: str | None = None) -> Part:
        """Copy turned by `rotation` (3, 3) about the origin, then shifted by `offset` (3), maybe under a new name."""
        vertices, normals = self.vertices, self.normals
        if rotation is not None:
            vertices, normals = vertices @ rotation.T, normals @ rotation.T
        if offset is not None:
            vertices = vertices + np.asarray(offset, float)
        return Part(vertices, self.faces, normals, self.texture, self.material, name or self.name)


def move(parts: list[Part], rotation: np.ndarray | None = None, offset=None, name: str | None = None) -> list[Part]:
    """`Part.moved` for a list."""
    return [part.moved(rotation, offset, name) for part in parts]


def unit(vectors) -> np.ndarray:
    """Vectors (..., 3) scaled to length 1."""
    vectors = np.asarray(vectors, float)
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-12)


def rotation(axis, degrees: float) -> np.ndarray:
    """Rotation matrix (3, 3) about "x", "y", "z" or a direction (3), right-handed."""
    angle = np.radians(degrees)
    x, y, z = unit(AXES[axis] if isinstance(axis, str) else axis)
    c, s = np.cos(angle), np.sin(angle)
    k = 1 - c
    return np.array(
        [
            [c + x * x * k, x * y * k - z * s, x * z * k + y * s],
            [y * x * k + z * s, c + y * y * k, y * z * k - x * s],
            [z * x * k - y * s, z * y * k + x * s, c + z * z * k],
        ]
    )


def align(start, end) -> np.ndarray:
    """Shortest rotation (3, 3) that takes direction `start` to direction `end`."""
    start, end = unit(start), unit(end)
    axis, cosine = np.cross(start, end), float(start @ end)
    if cosine < -0.9999:
        return rotation(unit(np.cross(start, (1, 0, 0)) + np.cross(start, (0, 1, 0)) * 1e-3), 180)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + cross + cross @ cross / (1 + cosine)


_CORNERS = np.array(
    [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], float
)
_SIDES = [(0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (2, 3, 7, 6), (1, 2, 6, 5), (3, 0, 4, 7)]
_SIDE_NORMALS = np.array([(0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (1, 0, 0), (-1, 0, 0)], float)


def box(low, high, material: Material, name: str = "world") -> Part:
    """Box between two corners."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    centre, half = (low + high) / 2, (high - low) / 2
    vertices = np.concatenate([centre + _CORNERS[list(side)] * half for side in _SIDES])
    faces = np.concatenate([[[4 * i, 4 * i + 1, 4 * i + 2], [4 * i, 4 * i + 2, 4 * i + 3]] for i in range(6)])
    return Part(vertices, faces, np.repeat(_SIDE_NORMALS, 4, 0), vertices.copy(), material, name)


def _ring_faces(first: int, second: int, sides: int) -> list[np.ndarray]:
    """Faces between two rings of `sides + 1` vertices that start at the vertices `first` and `second`."""
    a, b = first + np.arange(sides), second + np.arange(sides)
    return [np.stack([a, a + 1, b + 1], 1), np.stack([a, b + 1, b], 1)]


def lathe(profile, material: Material, sides: int = 20, crease: float = 50, name: str = "world") -> Part:
    """Surface of revolution about z.

    Args:
        profile: points (radius, height), listed from the bottom's outside to the top.
        sides: number of segments around.
        crease: neighbouring segments that meet at less than this angle are shaded as one smooth surface.
    """
    profile = np.asarray(profile, float)
    steps = np.diff(profile, axis=0)
    slopes = unit(np.stack([steps[:, 1], -steps[:, 0]], 1))
    angles = np.linspace(0, 2 * np.pi, sides + 1)
    cosines, sines = np.cos(angles), np.sin(angles)
    smooth = np.cos(np.radians(crease))
    vertices, normals, faces = [], [], []
    for i, slope in enumerate(slopes):
        lower = unit(slope + slopes[i - 1]) if i > 0 and slope @ slopes[i - 1] > smooth else slope
        upper = unit(slope + slopes[i + 1]) if i + 1 < len(steps) and slope @ slopes[i + 1] > smooth else slope
        for (radius, height), normal in ((profile[i], lower), (profile[i + 1], upper)):
            vertices.append(np.stack([radius * cosines, radius * sines, np.full(sides + 1, height)], 1))
            normals.append(np.stack([normal[0] * cosines, normal[0] * sines, np.full(sides + 1, normal[1])], 1))
        first = 2 * i * (sides + 1)
        faces += _ring_faces(first, first + sides + 1, sides)
    points = np.concatenate(vertices)
    return Part(points, np.concatenate(faces), np.concatenate(normals), points.copy(), material, name)


def ellipsoid(rx: float, ry: float, rz: float, material: Material, sides: int = 16, rings: int = 10) -> Part:
    """Ellipsoid around the origin with the given half axes."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings + 1)
    ball = lathe(np.stack([np.cos(latitude), np.sin(latitude)], 1), material, sides, 80)
    points = ball.vertices * [rx, ry, rz]
    return Part(points, ball.faces, unit(ball.normals / [rx, ry, rz]), points.copy(), material)


def tube(path, radii, material: Material, sides: int = 12, squash: float = 1.0, name: str = "world") -> Part:
    """Closed tube along a path.

    Args:
        path: points (P, 3).
        radii: one radius, or one for each point.
        squash: factor on the second axis of the cross-section; 1 is round.
    """
    path = np.asarray(path, float)
    radii = np.broadcast_to(np.asarray(radii, float), (len(path),)).copy()
    tangents = unit(np.gradient(path, axis=0))
    side = unit(np.cross(tangents[0], (0.3, 0.2, 1.0)))
    angles = np.linspace(0, 2 * np.pi, sides + 1)
    path = np.concatenate([path[:1], path, path[-1:]])  # both ends are closed by rings of no width
    tangents = np.concatenate([tangents[:1], tangents, tangents[-1:]])
    radii = np.concatenate([[1e-4], radii, [1e-4]])
    vertices, normals, faces = [], [], []
    for i, (point, tangent, radius) in enumerate(zip(path, tangents, radii, strict=True)):
        side = unit(side - (side @ tangent) * tangent)
        other = np.cross(tangent, side)
        ring = np.cos(angles)[:, None] * side + squash * np.sin(angles)[:, None] * other
        vertices.append(point + radius * ring)
        normals.append(unit(np.cos(angles)[:, None] * side * squash + np.sin(angles)[:, None] * other))
        if i + 1 < len(path):
            faces += _ring_faces(i * (sides + 1), (i + 1) * (sides + 1), sides)
    normals[0] = np.tile(-tangents[0], (sides + 1, 1))
    normals[-1] = np.tile(tangents[-1], (sides + 1, 1))
    points = np.concatenate(vertices)
    return Part(points, np.concatenate(faces), np.concatenate(normals), points.copy(), material, name)


def prism(outline, thickness: float, material: Material) -> Part:
    """The two faces of a nearly convex outline of points (x, z), `thickness` apart along y (for blades and gables)."""
    outline = np.asarray(outline, float)
    count = len(outline)
    centre = outline.mean(0)
    corner = np.arange(count)
    vertices, normals, faces = [], [], []
    for side in (-1, 1):
        depth = side * thickness / 2
        rim = np.stack([outline[:, 0], np.full(count, depth), outline[:, 1]], 1)
        first = len(faces) * (count + 1)
        vertices.append(np.concatenate([rim, [[centre[0], depth, centre[1]]]]))
        normals.append(np.tile([0.0, side, 0.0], (count + 1, 1)))
        faces.append(np.stack([first + corner, first + (corner + 1) % count, np.full(count, first + count)], 1))
    points = np.concatenate(vertices)
    return Part(points, np.concatenate(faces), np.concatenate(normals), points.copy(), material)


def spline(points, steps: int = 10) -> np.ndarray:
    """Smooth path (Catmull-Rom) through points (P, 3), `steps` points for each stretch between two of them."""
    points = np.asarray(points, float)
    points = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    path = []
    for i in range(1, len(points) - 2):
        a, b, c, d = points[i - 1 : i + 3]
        path.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate([*path, points[-2:-1]])
