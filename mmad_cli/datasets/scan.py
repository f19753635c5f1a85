"""Reading the files of one scan: what is accepted, and precise words for what is not.

Cloud: the first page of a TIFF, float32 (H, W, 3), metres, missing points (0, 0, 0). Further pages and the mask that
MVTec's files carry beside the cloud are not decoded. Image and ground truth: 8-bit PNG of the same size.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.datasets.base import Examination, Finding
from mmad_cli.types import GOOD, BoolArray, ByteArray, FloatArray, Sample, SampleRef

if TYPE_CHECKING:
    import tifffile

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_BIT_DEPTH_OFFSET = 24
# bit depth and colour type in the header
_GREY_16_BIT = bytes([16, 0])

# what damaged files make the readers raise
UNREADABLE = (OSError, ValueError, IndexError, KeyError, TypeError, SyntaxError, EOFError, struct.error, zlib.error)

COPY_AGAIN = "copy or download the file again"


@dataclass(eq=False)
class Unusable(Exception):  # noqa: N818 - carries a finding, never leaves this room
    """A file that cannot be used."""

    path: Path
    message: str
    advice: str


def examine_scan(ref: SampleRef, read_unused: bool = True) -> Examination:
    """Read the files of `ref` (`rgb`, `xyz` and, where there is one, `gt`) and collect what is wrong with each.

    read_unused: also read the ground truth of a good sample, which is known to be all zeros.
    """
    findings: list[Finding] = []
    roles = [role for role in ("xyz", "rgb", "gt") if role in ref.files]
    if ref.defect == GOOD and not read_unused:
        roles = [role for role in roles if role != "gt"]
    arrays: dict[str, Any] = {}
    for role in roles:
        path = ref.files[role]
        try:
            array = _READERS[role](path)
            check_size(path, array, arrays.get("xyz", arrays.get("rgb")), role)
            arrays[role] = array
        except Unusable as problem:
            findings.append(Finding("error", ref.category, str(problem.path), problem.message, problem.advice))
    if findings:
        return Examination(None, tuple(findings))
    marked = arrays.get("gt")
    if ref.defect == GOOD:
        if marked is not None and marked.any():
            message = f"marks {int(marked.sum())} pixels of a good sample as defective; they are ignored"
            findings.append(Finding("warning", ref.category, str(ref.files["gt"]), message))
        marked = None
    size = next(iter(arrays.values())).shape[:2]
    mask = np.zeros(size, dtype=bool) if marked is None else marked
    # what a sample lacks is black, or without a point
    rgb = arrays["rgb"] if "rgb" in arrays else np.zeros((*size, 3), dtype=np.uint8)
    xyz = arrays["xyz"] if "xyz" in arrays else np.zeros((*size, 3), dtype=np.float32)
    sample = Sample(ref.category, ref.split, ref.defect, ref.stem, rgb, xyz, mask)
    return Examination(sample, tuple(findings))


def read_xyz(path: Path) -> FloatArray:
    """Cloud float32 (H, W, 3) of a TIFF. Raises Unusable."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            _check_page(path, page)
            _check_complete(path, page)
            xyz = page.asarray()
    except PermissionError as error:
        raise no_permission(path, error) from error
    except UNREADABLE as error:
        advice = f"{COPY_AGAIN}; expected is a TIFF with float32 (H, W, 3)"
        raise Unusable(path, f"cannot be read as TIFF ({one_line(error)})", advice) from error
    cloud: FloatArray = np.ascontiguousarray(xyz, dtype=np.float32)
    _check_points(path, cloud)
    return cloud


def read_rgb(path: Path) -> ByteArray:
    """Image uint8 (H, W, 3) of a PNG; grey images, palettes and transparency become plain RGB. Raises Unusable."""
    return _read_png(path, grey=False)


def read_gt(path: Path) -> BoolArray:
    """Mask bool (H, W) of a PNG: true where any colour is above 0, since values are class ids. Raises Unusable."""
    image = _read_png(path, grey=True)
    return image > 0 if image.ndim == 2 else np.asarray((image > 0).any(axis=-1))


def read_depth(path: Path) -> NDArray[np.uint16]:
    """Depth codes uint16 (H, W) of a grey 16-bit PNG. Raises Unusable."""
    from PIL import Image

    try:
        with path.open("rb") as file:
            header = file.read(_BIT_DEPTH_OFFSET + 2)
            if not header.startswith(PNG_SIGNATURE):
                raise Unusable(path, "is not a PNG file", "a depth image is a grey 16-bit PNG; copy it again")
            if header[_BIT_DEPTH_OFFSET:] != _GREY_16_BIT:
                bits, colours = (*header[_BIT_DEPTH_OFFSET:], 0, 0)[:2]
                kind = f"{bits} bits per channel" + (" and colours" if colours else "")
                advice = "a depth image is a grey 16-bit PNG; take the original file, it cannot be restored from 8 bits"
                raise Unusable(path, f"has {kind}", advice)
            file.seek(0)
            with Image.open(file, formats=["PNG"]) as image:
                return np.asarray(image).astype(np.uint16)
    except PermissionError as error:
        raise no_permission(path, error) from error
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise Unusable(path, f"cannot be read as PNG ({one_line(error)})", COPY_AGAIN) from error


_READERS = {"xyz": read_xyz, "rgb": read_rgb, "gt": read_gt}


def _check_page(path: Path, page: tifffile.TiffPage) -> None:
    shape, dtype = page.shape, page.dtype
    wanted = "expected are three float32 channels (H, W, 3): x, y, z in metres"
    if len(shape) != 3 or shape[-1] != 3:
        raise Unusable(path, f"has the shape {shape}", f"{wanted}; is it a depth image? Convert it to points")
    if dtype is None or dtype.kind != "f" or dtype.itemsize != 4:
        raise Unusable(path, f"holds {dtype} values", f"{wanted}; convert and save it again as float32")


def _check_complete(path: Path, page: tifffile.TiffPage) -> None:
    """A file that was cut off would otherwise be filled up with zeros, which look like missing points."""
    needed = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
    size = path.stat().st_size
    if needed > size:
        raise Unusable(path, f"is cut off: {size} bytes of at least {needed}", COPY_AGAIN)


def _check_points(path: Path, xyz: FloatArray) -> None:
    from mmad_cli.preprocessing.resize import valid_pixels

    finite = np.isfinite(xyz)
    if not finite.all():
        count = int((~finite).any(axis=-1).sum())
        raise Unusable(
            path, f"{count} pixels have NaN or infinite coordinates", "mark missing points as (0, 0, 0) and save again"
        )
    if not valid_pixels(xyz).any():
        raise Unusable(
            path, "has no valid point: everywhere at least one coordinate is 0", "remove the sample or scan it again"
        )


def _read_png(path: Path, grey: bool) -> ByteArray:
    """Image uint8 (H, W, 3), or (H, W) with `grey` where the file holds no colours."""
    from PIL import Image

    try:
        with path.open("rb") as file:
            header = file.read(_BIT_DEPTH_OFFSET + 1)
            if not header.startswith(PNG_SIGNATURE):
                raise Unusable(path, "is not a PNG file", "save the image as 8-bit PNG")
            # Pillow would silently drop the lower half of 16-bit colours
            if len(header) > _BIT_DEPTH_OFFSET and header[_BIT_DEPTH_OFFSET] > 8:
                raise Unusable(path, f"has {header[_BIT_DEPTH_OFFSET]} bits per channel", "save it as 8-bit PNG")
            file.seek(0)
            with Image.open(file, formats=["PNG"]) as image:
                if image.mode not in IMAGE_MODES:
                    advice = f"save it as 8-bit PNG in one of the modes {', '.join(IMAGE_MODES)}"
                    raise Unusable(path, f"has the image mode {image.mode}", advice)
                mode = "L" if grey and image.mode in ("1", "L", "LA") else "RGB"
                return np.array(image.convert(mode), dtype=np.uint8)
    except PermissionError as error:
        raise no_permission(path, error) from error
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise Unusable(path, f"cannot be read as PNG ({one_line(error)})", COPY_AGAIN) from error


def check_size(path: Path, array: Any, xyz: NDArray[Any] | None, role: str) -> None:
    """Raises Unusable where an image (`rgb`) or ground truth has not the size of the cloud or depth `xyz`."""
    if xyz is None or array.shape[:2] == xyz.shape[:2]:
        return
    kind = "image" if role == "rgb" else "ground truth"
    raise Unusable(
        path,
        f"{kind} is {array.shape[0]} x {array.shape[1]} pixels, the cloud beside it {xyz.shape[0]} x {xyz.shape[1]}",
        "rgb, xyz and gt of a sample must have one size",
    )


def no_permission(path: Path, error: PermissionError) -> Unusable:
    """The finding about a file that may not be opened."""
    return Unusable(path, f"cannot be opened ({os.strerror(error.errno or 0)})", "give read permission")


def one_line(error: BaseException) -> str:
    """The words of an error, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
