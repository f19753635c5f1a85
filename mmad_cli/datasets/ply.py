"""Points of a PLY file (Turk, "The PLY polygon file format", 1994): ASCII and binary of either byte order.

Only x, y and z of the element `vertex` are read, in the order of the file; everything else is stepped over.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmad_cli.datasets.scan import COPY_AGAIN, UNREADABLE, Unusable, no_permission, one_line
from mmad_cli.types import FloatArray

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LIST = "list"
_LONGEST_HEADER = 1 << 20
_AXES = ("x", "y", "z")


@dataclass
class _Element:
    """An element of the header: its name, how many there are, and its properties with their types."""

    name: str
    count: int
    properties: list[tuple[str, str]]


@dataclass(frozen=True)
class _Header:
    byte_order: str
    elements: list[_Element]
    size: int


def read_points(path: Path) -> FloatArray:
    """Points float32 (n, 3) of a PLY file, in the unit of the file. Raises Unusable."""
    try:
        data = path.read_bytes()
        header = _header(path, data)
        points = _ascii(path, data, header) if not header.byte_order else _binary(path, data, header)
    except PermissionError as error:
        raise no_permission(path, error) from error
    except UNREADABLE as error:
        raise Unusable(path, f"cannot be read as PLY ({one_line(error)})", COPY_AGAIN) from error
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        count = int((~finite).sum())
        raise Unusable(path, f"{count} points have NaN or infinite coordinates", "remove them and save again")
    return points


def _header(path: Path, data: bytes) -> _Header:
    if not data.startswith((b"ply\n", b"ply\r")):
        raise Unusable(path, "is not a PLY file: it does not begin with 'ply'", COPY_AGAIN)
    end = data.find(b"end_header", 0, _LONGEST_HEADER)
    line_end = data.find(b"\n", end)
    if end < 0 or line_end < 0:
        raise Unusable(path, "is cut off: the PLY header has no end", COPY_AGAIN)
    order: str | None = None
    elements: list[_Element] = []
    for line in data[:end].decode("ascii", errors="replace").splitlines()[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format":
            order = _BYTE_ORDERS.get(words[1])
        elif words[0] == "element":
            elements.append(_Element(words[1], int(words[2]), []))
        elif words[0] == "property" and elements:
            elements[-1].properties.append((words[-1], _LIST if words[1] == _LIST else _TYPES[words[1]]))
        else:
            raise Unusable(path, f"has the unknown line {line!r} in its PLY header", COPY_AGAIN)
    if order is None:
        raise Unusable(path, "has no known format in its PLY header", f"expected is one of {', '.join(_BYTE_ORDERS)}")
    return _Header(order, elements, line_end + 1)


def _vertex(path: Path, header: _Header) -> tuple[_Element, list[_Element]]:
    """The vertex element and those before it."""
    for index, element in enumerate(header.elements):
        if element.name == "vertex":
            missing = [axis for axis in _AXES if axis not in dict(element.properties)]
            if missing:
                raise Unusable(path, f"has vertices without {', '.join(missing)}", "expected are x, y and z")
            return element, header.elements[:index]
    raise Unusable(path, "has no element 'vertex' in its PLY header", "expected is a point cloud with x, y and z")


def _binary(path: Path, data: bytes, header: _Header) -> FloatArray:
    vertex, before = _vertex(path, header)
    if any(kind == _LIST for element in (*before, vertex) for _, kind in element.properties):
        advice = "save it with the vertices first and without lists, or as ASCII"
        raise Unusable(path, "has lists before or in its vertices, which cannot be stepped over", advice)
    start = header.size + sum(element.count * _record(element, header).itemsize for element in before)
    record = _record(vertex, header)
    needed = start + vertex.count * record.itemsize
    if len(data) < needed:
        raise Unusable(path, f"is cut off: {len(data)} bytes of at least {needed}", COPY_AGAIN)
    rows = np.frombuffer(data, dtype=record, count=vertex.count, offset=start)
    columns = [name for name, _ in vertex.properties]
    return _points([rows[f"f{columns.index(axis)}"] for axis in _AXES])


def _record(element: _Element, header: _Header) -> np.dtype[np.void]:
    # by number, since files repeat property names
    return np.dtype([(f"f{i}", header.byte_order + kind) for i, (_, kind) in enumerate(element.properties)])


def _ascii(path: Path, data: bytes, header: _Header) -> FloatArray:
    vertex, before = _vertex(path, header)
    columns = [name for name, _ in vertex.properties]
    if any(kind == _LIST for _, kind in vertex.properties):
        raise Unusable(path, "has lists in its vertices", "save it without them")
    with warnings.catch_warnings():
        # an empty cloud is told below
        warnings.simplefilter("ignore", UserWarning)
        rows = np.loadtxt(
            io.BytesIO(data[header.size :]),
            usecols=[columns.index(axis) for axis in _AXES],
            skiprows=sum(element.count for element in before),
            max_rows=vertex.count,
            ndmin=2,
            comments=None,
        )
    if len(rows) < vertex.count:
        raise Unusable(path, f"is cut off: {len(rows)} of {vertex.count} points", COPY_AGAIN)
    return _points([rows[:, i] for i in range(3)]) if vertex.count else np.zeros((0, 3), np.float32)


def _points(columns: list[NDArray[np.generic]]) -> FloatArray:
    return np.stack([np.asarray(column, dtype=np.float32) for column in columns], axis=1)
