"""Data sets: folders, files and built-in names become instances with ids, and a split that does not leak."""

from mnif.data.binvox import read_binvox, write_binvox
from mnif.data.built_in import BUILT_IN
from mnif.data.images import ImageData, load_images, picture_size
from mnif.data.instances import Instances, SelectedRows, Split
from mnif.data.loading import SIGNALS, load_data, signal_of
from mnif.data.pictures import IMAGE_SUFFIXES
from mnif.data.views import ViewData, load_views
from mnif.data.voxels import VoxelData, load_voxels

__all__ = [
    "BUILT_IN",
    "IMAGE_SUFFIXES",
    "SIGNALS",
    "ImageData",
    "Instances",
    "SelectedRows",
    "Split",
    "ViewData",
    "VoxelData",
    "load_data",
    "load_images",
    "load_views",
    "load_voxels",
    "picture_size",
    "read_binvox",
    "signal_of",
    "write_binvox",
]
