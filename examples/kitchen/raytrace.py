"""Pixels by ray tracing with embree: per sub-sample a primary, a soft shadow and an occlusion ray, shaded in numpy.

Shadow and occlusion rays follow one fixed 4 x 4 pattern and are averaged over 4 x 4 sub-samples of the same surface:
an image has no noise and depends on nothing but the scene. Shapes: S = (size * samples)^2 sub-samples, row by row.
"""

from __future__ import annotations

import numpy as np

from .geom import Part, unit

try:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene
except ImportError as error:
    raise ImportError('The kitchen traces its rays with embreex; `pip install "lego-pipeline[kitchen]"`.') from error

PATTERNS = ("plain", "wood", "tiles", "speckle", "stripes", "marble", "rings")
SURFACE_OFFSET = 2e-3  # metres by which secondary rays start off the surface
OCCLUSION_RANGE = 0.30  # metres
BACKGROUND = 0.75

# The 16 sample points of a 4 x 4 block of sub-samples: a Bayer order and a scrambled one, in 0 to 1.
_BAYER = np.array([0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5])
_POINTS = np.stack([(_BAYER + 0.5) / 16, (np.arange(16) * 7 % 16 + 0.5) / 16], 1).astype(np.float32)


class Camera:
    """Pinhole camera with a square image."""

    def __init__(self, position, target, field_of_view: float = 57.0, roll: float = 0.0):
        """Look from `position` to `target` (3, metres); field of view and roll in degrees."""
        self.position = np.asarray(position, float)
        forward = unit(np.asarray(target, float) - self.position)
        right = unit(np.cross(forward, (0, 0, 1)))
        up = np.cross(right, forward)
        angle = np.radians(roll)
        self.axes = np.stack(  # rows: right, up, forward
            [np.cos(angle) * right + np.sin(angle) * up, -np.sin(angle) * right + np.cos(angle) * up, forward]
        )
        self.slope = np.tan(np.radians(field_of_view) / 2)

    def point(self, x: float, y: float, depth: float) -> np.ndarray:
        """World point (3,) at the image position x, y in -1 to 1 (y up) and `depth` metres in front."""
        return self.position + depth * (self.axes[2] + self.slope * (x * self.axes[0] + y * self.axes[1]))

    def rays(self, count: int) -> np.ndarray:
        """Unit directions (count^2, 3) through the centres of a count x count grid, row by row from the top."""
        grid = (np.arange(count) + 0.5) / count * 2 - 1
        x, y = np.meshgrid(grid, -grid)
        rays = self.axes[2] + self.slope * (x[..., None] * self.axes[0] + y[..., None] * self.axes[1])
        return unit(rays).reshape(-1, 3)


class Mesh:
    """All parts of a scene as one mesh: V vertices, F faces."""

    def __init__(self, parts: list[Part]):
        self.materials, self.names = [], []
        material_number: dict[int, int] = {}
        name_number: dict[str, int] = {}
        faces, face_materials, face_names, first = [], [], [], 0
        for part in parts:
            material = material_number.setdefault(id(part.material), len(self.materials))
            if material == len(self.materials):
                self.materials.append(part.material)
            name = name_number.setdefault(part.name, len(self.names))
            if name == len(self.names):
                self.names.append(part.name)
            faces.append(part.faces + first)
            face_materials.append(np.full(len(part.faces), material))
            face_names.append(np.full(len(part.faces), name))
            first += len(part.vertices)
        self.vertices = np.concatenate([part.vertices for part in parts]).astype(np.float32)  # (V, 3)
        self.normals = np.concatenate([part.normals for part in parts]).astype(np.float32)  # (V, 3)
        self.texture = np.concatenate([part.texture for part in parts]).astype(np.float32)  # (V, 3)
        self.faces = np.concatenate(faces).astype(np.int32)  # (F, 3)
        self.face_material = np.concatenate(face_materials)  # (F,)
        self.face_name = np.concatenate(face_names)  # (F,)


def trace(
    parts: list[Part], camera: Camera, light: dict, size: int = 128, samples: int = 2
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Render parts.

    Args:
        parts: the scene.
        camera: where it is seen from.
        light: the square area light: "position" (3), its edges "u" and "v" (3), "colour" (3); "ambient" (3), light of
            the room, and "fill", light from the camera.
        size: pixels along a side.
        samples: sub-samples along a side of a pixel.

    Returns:
        image: (size, size, 3) uint8.
        part_map: (size, size) int, the part at each pixel's first sub-sample as an index into `names`, -1 for none.
        names: the part names.
    """
    mesh = Mesh(parts)
    scene = EmbreeScene()
    TriangleMesh(scene, mesh.vertices, mesh.faces)
    count = size * samples
    rays = camera.rays(count).astype(np.float32)  # (S, 3)
    origins = np.broadcast_to(camera.position.astype(np.float32), rays.shape).copy()
    hits = scene.run(origins, rays, output=1)
    is_hit = hits["primID"] >= 0
    face = np.where(is_hit, hits["primID"], 0)
    u, v = hits["u"][:, None], hits["v"][:, None]
    distance = np.where(is_hit, hits["tfar"], 1.0).astype(np.float32)
    corners = mesh.faces[face]

    def interpolate(values: np.ndarray) -> np.ndarray:
        return (1 - u - v) * values[corners[:, 0]] + u * values[corners[:, 1]] + v * values[corners[:, 2]]

    normal = unit(interpolate(mesh.normals)).astype(np.float32)
    normal[(normal * rays).sum(1) > 0] *= -1
    point = origins + rays * distance[:, None]
    edge_1 = mesh.vertices[corners[:, 1]] - mesh.vertices[corners[:, 0]]
    edge_2 = mesh.vertices[corners[:, 2]] - mesh.vertices[corners[:, 0]]
    flat_normal = unit(np.cross(edge_1, edge_2)).astype(np.float32)
    flat_normal[(flat_normal * rays).sum(1) > 0] *= -1
    start = (point + flat_normal * SURFACE_OFFSET).astype(np.float32)

    part = mesh.face_name[face]
    surface = part * 64 + (np.round(flat_normal @ [3, 7, 17]).astype(int) % 64)  # same part and roughly the same side
    row = np.arange(count)
    block = ((row[:, None] % 4) * 4 + row[None, :] % 4).reshape(-1)
    h1, h2 = _POINTS[block, 0], _POINTS[block, 1]
    to_light, lit = _light(scene, start, light, h1, h2, surface, count)
    openness = _openness(scene, start, normal, h1, h2, surface, count)

    material = mesh.face_material[face]
    base = _base_colour(mesh.materials, material, interpolate(mesh.texture))
    gloss = np.array([m.gloss for m in mesh.materials], np.float32)[material]
    glow = np.array([m.glow for m in mesh.materials], np.float32)[material]
    ambient = np.asarray(light["ambient"], np.float32) * (0.62 + 0.38 * normal[:, 2:3])
    colour = np.asarray(light["colour"], np.float32)
    facing_light = np.clip((normal * to_light).sum(1), 0, 1)
    facing = np.clip(-(normal * rays).sum(1), 0, 1)
    fill = facing[:, None] * np.float32(light["fill"])
    halfway = unit(to_light - rays)
    highlight = np.clip((normal * halfway).sum(1), 0, 1) ** (20 + 100 * gloss) * gloss * 0.7 * lit
    open_ = (openness * 0.85 + 0.15)[:, None]
    pixels = base * (ambient * open_ + fill * open_ + colour * (facing_light * lit)[:, None])
    pixels = pixels + colour * highlight[:, None] + base * glow[:, None]
    pixels += ((1 - facing) ** 4 * gloss * 0.18)[:, None] * open_  # light grazing a glossy rim
    pixels[~is_hit] = BACKGROUND
    pixels = 1.42 * pixels / (1 + 0.36 * pixels)  # gentle shoulder
    pixels = pixels.reshape(size, samples, size, samples, 3).mean((1, 3))
    image = (np.clip(pixels, 0, 1) ** (1 / 2.0) * 255 + 0.5).astype(np.uint8)
    part_map = np.where(is_hit, part, -1).reshape(count, count)[::samples, ::samples]
    return image, part_map, mesh.names


def _light(scene, start, light, h1, h2, surface, count) -> tuple[np.ndarray, np.ndarray]:
    """Direction to the light's centre (S, 3), used for shading, and the share of the light that is seen (S,)."""
    centre, u, v = (np.asarray(light[key], np.float32) for key in ("position", "u", "v"))
    towards = centre + (h1 - 0.5)[:, None] * u + (h2 - 0.5)[:, None] * v - start
    distance = np.linalg.norm(towards, axis=1)
    towards = (towards / distance[:, None]).astype(np.float32)
    blocked = scene.run(start, towards, dists=(distance * 0.98).astype(np.float32), query="OCCLUDED")
    return unit(centre - start).astype(np.float32), _smooth((blocked < 0).astype(np.float32), surface, count)


def _openness(scene, start, normal, h1, h2, surface, count) -> np.ndarray:
    """Share of the hemisphere within reach that nothing blocks (S,), by one cosine-weighted ray each."""
    angle, radius = 2 * np.pi * h1, np.sqrt(h2)
    other = np.where(np.abs(normal[:, :1]) < 0.8, np.array([[1, 0, 0]], np.float32), np.array([[0, 1, 0]], np.float32))
    tangent = unit(np.cross(normal, other))
    bitangent = np.cross(normal, tangent)
    rays = (radius * np.cos(angle))[:, None] * tangent + (radius * np.sin(angle))[:, None] * bitangent
    rays = (rays + np.sqrt(1 - h2)[:, None] * normal).astype(np.float32)
    blocked = scene.run(start, rays, dists=np.full(len(rays), OCCLUSION_RANGE, np.float32), query="OCCLUDED")
    return _smooth((blocked < 0).astype(np.float32), surface, count)


def _smooth(values: np.ndarray, surface: np.ndarray, count: int) -> np.ndarray:
    """Average of values (S,) over a 4 x 4 window among the sub-samples of the same surface."""
    values, surface = values.reshape(count, count), surface.reshape(count, count)
    padded, padded_surface = np.pad(values, 2, mode="edge"), np.pad(surface, 2, mode="edge")
    total, weight = np.zeros_like(values), np.zeros_like(values)
    for dy in range(4):
        for dx in range(4):
            same = padded_surface[dy : dy + count, dx : dx + count] == surface
            total += same * padded[dy : dy + count, dx : dx + count]
            weight += same
    return (total / np.maximum(weight, 1)).reshape(-1)


def _base_colour(materials, material: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Colour of the surfaces (S, 3) before light: S material numbers and points (S, 3) in the solid patterns."""
    first = np.array([m.colour for m in materials], np.float32)
    second = np.array([m.second or m.colour for m in materials], np.float32)
    pattern = np.array([PATTERNS.index(m.pattern) for m in materials])[material]
    scale = np.array([m.scale for m in materials], np.float32)
    colour = first[material]
    for number in np.unique(pattern):
        if number == 0:
            continue
        where = np.nonzero(pattern == number)[0]
        share = _pattern(PATTERNS[number], texture[where] * scale[material[where]][:, None])
        share = share[:, None].astype(np.float32)
        colour[where] = first[material[where]] * (1 - share) + second[material[where]] * share
    return colour


def _pattern(name: str, p: np.ndarray) -> np.ndarray:
    """Share (N,) of the second colour at points p (N, 3)."""
    if name == "wood":  # streaks along x
        q = p * [3.0, 26, 26]
        return 0.5 + 0.5 * np.sin(q[:, 1] + q[:, 2] + 2.5 * _waves(p * [2.0, 9, 9]))
    if name == "tiles":  # joints in x and z
        x, z = p[:, 0] % 1, p[:, 2] % 1
        return ((x < 0.06) | (z < 0.06)).astype(np.float32)
    if name == "speckle":
        h = np.sin(np.floor(p[:, 0] * 90) * 12.98 + np.floor(p[:, 1] * 90) * 78.23) * 43758.5453
        return ((h - np.floor(h)) > 0.8).astype(np.float32) * 0.7
    if name == "stripes":
        return ((p[:, 0] * 10) % 1 < 0.4).astype(np.float32)
    if name == "marble":
        return np.clip(np.abs(np.sin(p[:, 0] * 5 + p[:, 1] * 7 + 2.5 * _waves(p * 5))) ** 8, 0, 1)
    return (np.abs((p[:, 2] * 14) % 1 - 0.5) < 0.16).astype(np.float32)  # rings


def _waves(p: np.ndarray) -> np.ndarray:
    """Smooth irregular values (N,) in -1 to 1 at points p (N, 3)."""
    x, y, z = p[:, 0], p[:, 1], p[:, 2]
    return (
        np.sin(x * 1.7 + np.sin(y * 2.3 + z))
        + np.sin(y * 3.1 + np.sin(z * 2.7 + x * 1.3))
        + np.sin(z * 2.1 + np.sin(x * 3.7 + y))
    ) / 3
