"""What `torch.save` made of one plain tensor, read without unpickling.

The format is a zip archive: the numbers as they are, and a pickle that says dtype and shape. That
pickle is not run but compared: `torch.save` writes the same bytes for every tensor of a dtype and
shape.
"""

from __future__ import annotations

import io
import zipfile

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved(tensor: Tensor) -> bytes:
    """The tensor as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def read_saved(content: bytes, width: int) -> Tensor:
    """The tensor [T, width] in `content`. Raises `ValueError` for anything but a dense one."""
    try:
        numbers, described = _parts(content)
    except (zipfile.BadZipFile, KeyError, IndexError) as error:
        raise ValueError(f"is not what torch.save writes ({error})") from error
    for dtype in DTYPES:
        count = len(numbers) // dtype.itemsize
        shape = (count // width, width)
        if not count or len(numbers) != shape[0] * width * dtype.itemsize:
            continue
        if described == _parts(saved(torch.empty(shape, dtype=dtype)))[1]:
            return torch.frombuffer(bytearray(numbers), dtype=dtype).view(shape)
    raise ValueError(
        f"is not a dense tensor of shape (tokens, {width}) in float32, bfloat16 or float16 with a "
        "storage of its own"
    )


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """The numbers, and the pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root = archive.namelist()[0].split("/")[0]
        return archive.read(f"{root}/data/0"), archive.read(f"{root}/data.pkl")
