"""Views of a radiance field from an exported bundle: the rays of a camera, their colours.

This file stands by itself (Python 3.8, NumPy) and is copied into every bundle's ``device/``. Its cameras are those of
``mnif.rendering``, which needs torch.
"""

from __future__ import annotations

import numpy as np

from export.bundle_folder import BundleError, entry
from export.runtime import Bundle

_RAYS_AT_ONCE = 4096


class Camera:
    """A camera on a turntable around the y axis, looking at the origin; intrinsics and distance are the manifest's.

    Args:
        bundle: what to run.
        precision: ``"fp32"`` or ``"mixed"``; None takes what is there, float32 first.
        name: of a baked instance's graph of rays; None for the graph that takes coefficients.

    Raises:
        BundleError: the bundle is not of radiance fields.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None, name: str | None = None):
        if bundle.manifest.get("radiance") is None:
            raise BundleError(f"{bundle.folder.path}: no bundle of radiance fields, it has no views")
        self._bundle = bundle
        self._radiance = entry(bundle.manifest, "radiance", kind=dict)
        self._name = name or bundle.folder.find_graphs("rays", precision=precision)[0]

    def __call__(self, coefficients: np.ndarray | None, azimuth: float, elevation: float = 30.0) -> np.ndarray:
        """One view.

        Args:
            coefficients: [1, cells, layers, bases]; None for a baked instance.
            azimuth: degrees from +z towards +x.
            elevation: degrees above the plane y = 0.

        Returns:
            Colours [height, width, 3] in [-1, 1].
        """
        origins, directions = turntable_rays(
            azimuth, elevation, self._radiance["camera_distance"], self._radiance["intrinsics"], self._radiance["size"]
        )
        parts = []
        for begin in range(0, len(directions), _RAYS_AT_ONCE):
            rays = [each[begin : begin + _RAYS_AT_ONCE] for each in (origins, directions)]
            if coefficients is None:
                parts.append(self._bundle.run(self._name, *rays)[0])
            else:
                parts.append(self._bundle.run(self._name, coefficients, *[each[None] for each in rays])[0][0])
        return np.concatenate(parts).reshape(*self._radiance["size"], 3)


def turntable_rays(
    azimuth: float, elevation: float, distance: float, intrinsics: list[float], size: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Origins and directions [height · width, 3] through the centres of all pixels, row by row.

    Args:
        azimuth: degrees from +z towards +x.
        elevation: degrees above the plane y = 0.
        distance: to the origin.
        intrinsics: fx, fy, cx, cy in pixels; the centre of row r, column c lies at (c + 1/2, r + 1/2).
        size: height and width.
    """
    (height, width), (fx, fy, cx, cy) = size, intrinsics
    turn, rise = np.radians(azimuth), np.radians(elevation)
    right = np.array([np.cos(turn), 0.0, -np.sin(turn)])
    up = np.array([-np.sin(rise) * np.sin(turn), np.cos(rise), -np.sin(rise) * np.cos(turn)])
    backward = np.array([np.cos(rise) * np.sin(turn), np.sin(rise), np.cos(rise) * np.cos(turn)])
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    sideways, upwards = (columns - cx) / fx, (cy - rows) / fy  # rows count downwards
    directions = (sideways[..., None] * right + upwards[..., None] * up - backward).reshape(-1, 3)
    directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.broadcast_to(distance * backward, directions.shape), directions
