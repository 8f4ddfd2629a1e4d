"""`render`: the picture of a scene, and what every pixel of it shows."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniworld.data.scenes import backdrops, camera, contours, shading, solids, styles, surfaces
from uniworld.data.scenes.graph import PLAIN, Scene
from uniworld.kernels import extension

SIZE_STEP_PX = 16


@dataclass(frozen=True)
class Rendered:
    """A scene's picture and its exact geometry at the pixel centres. H = W = size_px."""

    scene: Scene
    image: np.ndarray
    """uint8 [H, W, 3], sRGB, in the scene's style."""
    ids: np.ndarray
    """uint8 [H, W]: 0 where the background shows, i + 1 where the i-th thing does."""
    depth: np.ndarray
    """float32 [H, W]: distance along the view to the thing, floor or wall, world units."""
    normal: np.ndarray
    """float32 [H, W, 3]: unit normals in camera space (x right, y down, z away)."""
    joints: dict[int, np.ndarray]
    """Of each doll by its index: pixels and depth [14, 3] in the order of `doll.JOINT_NAMES`."""


def render(scene: Scene, size_px: int = 128) -> Rendered:
    """Draw a scene. The same scene gives the same bytes.

    Raises:
        ValueError: size_px is no positive multiple of 16.
    """
    check_size(size_px)
    tables = solids.tables(scene)
    image = _image(scene, tables, size_px)
    ids, depth, normal, _ = geometry(tables, size_px)
    joints = {index: _in_picture(points, size_px) for index, points in tables.joints.items()}
    return Rendered(scene, image, ids, depth, normal, joints)


def picture_of(scene: Scene, size_px: int = 128) -> np.ndarray:
    """The image of `render` alone, in less time: uint8 [H, W, 3]. Raises: as `render`."""
    check_size(size_px)
    return _image(scene, solids.tables(scene), size_px)


def _image(scene: Scene, tables: solids.Tables, size_px: int) -> np.ndarray:
    light, floor_rays, solid_rays = surfaces.light_rows(scene.light)
    eye = (view(), view_rays(size_px, 2), view_rays(size_px, 1))
    backdrop = backdrops.backdrop(scene.background, backdrops.texture_of(scene.seed), size_px)
    around = _around(light, backdrop)
    draw = _draw_core if extension.has("scene_picture") else shading.picture
    image = draw(tables, *eye, light, floor_rays, solid_rays, around, backdrop.albedo, surfaces.srgb_table())
    if scene.background == PLAIN:
        image = _on_white(image, tables, size_px)
    lines = fine_contours(scene, size_px, thick=False) if scene.style in styles.NEED_LINES else None
    return styles.apply(scene.style, image, lines)


def _on_white(image: np.ndarray, tables: solids.Tables, size_px: int) -> np.ndarray:
    """The things alone, without shadows, on white; at their edges by the share that they cover, 2x2 samples a pixel."""
    covered = covered_samples(tables, size_px, 2)[..., None]
    return ((covered * image.astype(np.int64) + (4 - covered) * 255 + 2) // 4).astype(np.uint8)


def covered_samples(tables: solids.Tables, num_cells: int, samples: int) -> np.ndarray:
    """int64 [num_cells, num_cells]: how many of samples x samples points of every cell of the picture show a thing."""
    there = geometry(tables, num_cells * samples)[0] > 0
    return there.reshape(num_cells, samples, num_cells, samples).sum((1, 3))


def fine_contours(scene: Scene, size_px: int, thick: bool) -> np.ndarray:
    """`contours` of a scene, from geometry at twice the size: smooth lines, float32 [H, W] from 0 to 1."""
    ids, depth, normal, _ = geometry(solids.tables(scene), 2 * size_px)
    seam = backdrops.has_seam(scene.background)
    return contours.halve(contours.contours(ids, depth, normal, seam, thick))


def check_size(size_px: int) -> None:
    if size_px <= 0 or size_px % SIZE_STEP_PX:
        raise ValueError(f"size_px={size_px}: must be a positive multiple of {SIZE_STEP_PX}")


def visible_shares(scene: Scene, size_px: int = 64) -> np.ndarray:
    """float64 [things]: the share of each thing's pixels that no other thing hides; 0 for one outside the picture."""
    ids, _, _, covered = geometry(solids.tables(scene), size_px)
    seen = np.bincount(ids.ravel(), minlength=len(scene.things) + 1)[1:]
    return seen / np.maximum(covered, 1)


def geometry(tables: solids.Tables, size_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids, depth and normals as `Rendered` has them, and how many pixels each thing would cover alone."""
    run = _geometry_core if extension.has("scene_geometry") else shading.geometry
    return run(tables, view(), view_rays(size_px, 1))


@lru_cache(maxsize=1)
def view() -> np.ndarray:
    """float64 [14]: the camera as the ray caster takes it."""
    axes = (camera.POSITION, camera.RIGHT, camera.UP, camera.FORWARD)
    return np.array([v for axis in axes for v in axis] + [camera.TAN_HALF_FOV, camera.WALL_Z])


@lru_cache(maxsize=8)
def view_rays(size_px: int, step: int) -> np.ndarray:
    """float64 [n, n, 3]: unit directions through step x step points a pixel, n = size_px step."""
    return shading.view_rays(view(), size_px, step)


def _around(light: np.ndarray, backdrop: backdrops.Backdrop) -> np.ndarray:
    """float64 [14]: what shines back on things from floor and wall under this light."""
    on_floor = light[6:9] + light[3:6] * light[1]
    on_wall = light[6:9] + shading.WALL_FACING * light[3:6]
    bounce = light[9] * (light[6:9] + 0.45 * light[3:6]) * (0.35 + 0.65 * backdrop.floor)
    around = [backdrop.floor * on_floor, backdrop.low * on_wall, backdrop.high * on_wall, bounce]
    return np.concatenate([*around, [float(backdrop.wall_lit), backdrop.bend]])


def _in_picture(points: np.ndarray, size_px: int) -> np.ndarray:
    depth = camera.to_camera(points)[:, 2:]
    return np.concatenate([camera.project(points, size_px), depth], 1)


def _draw_core(tables, view_row, quarter_rays, centre_rays, light, floor_rays, solid_rays, around, albedo, srgb):
    image = np.empty((*albedo.shape[:2], 3), np.uint8)
    eye = [array.ctypes.data for array in (view_row, quarter_rays, centre_rays)]
    lights = (light.ctypes.data, _table(floor_rays), _table(solid_rays), around.ctypes.data)
    surface = (albedo.ctypes.data, _table(srgb), len(albedo))
    extension.core().scene_picture(*_tables(tables), *eye, *lights, *surface, image.ctypes.data)
    return image


def _geometry_core(tables, view_row, centre_rays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shape = centre_rays.shape[:2]
    ids, depth = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    normal, covered = np.empty((*shape, 3), np.float32), np.empty(len(tables.things), np.int64)
    out = [array.ctypes.data for array in (ids, depth, normal, covered)]
    eye = (view_row.ctypes.data, centre_rays.ctypes.data, len(centre_rays))
    extension.core().scene_geometry(*_tables(tables), *eye, *out)
    return ids, depth, normal, covered


def _table(rows: np.ndarray) -> tuple[int, int]:
    return rows.ctypes.data, len(rows)


def _tables(tables: solids.Tables) -> tuple:
    counted = [_table(rows) for rows in (tables.solids, tables.things, tables.feet)]
    return *counted, tables.dots.ctypes.data, tables.planes.ctypes.data
