"""Raw scan to clean scan: plane removal, debris removal, squaring, resizing. Pure functions on `Sample`."""

from mmad_cli.preprocessing.clean import preprocess
from mmad_cli.preprocessing.config import PREPROCESSING_VERSION, PreprocessConfig
from mmad_cli.preprocessing.resize import centre_crop_view, resize_rgb, to_network_size, valid_pixels

__all__ = [
    "PREPROCESSING_VERSION",
    "PreprocessConfig",
    "centre_crop_view",
    "preprocess",
    "resize_rgb",
    "to_network_size",
    "valid_pixels",
]
