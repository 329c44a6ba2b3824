"""Pictures to learn from: CIFAR-10 in each of its layouts, or a folder of one's own.

    data = read("data")                    # torchvision's root, the official binary version, or a folder of pictures
    x = data.batch(torch.tensor([3, 1, 4]), flipped=torch.tensor([True, False, False]))       # (3, 3, H, W) in [-1, 1]

What lies in the folder decides: `*.bin` or `*.bin.xz` (a record is a label and 3 x 32 x 32 bytes), the pickles of the
python version (of which nothing is made but arrays), or pictures of one size, whose labels are the names of their
folders. `download` fetches the binary version and checks it.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD = 1 + 3 * SIDE**2
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
"""As that page has it."""
KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Pictures:
    """n pictures.

    Attributes:
        pixels: (n, 3, H, W), bytes.
        labels: (n,), or nothing where there are none.
        classes: their names.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Pictures `index`, (n, 3, H, W), from -1 to 1; those `flipped`, (n,), left to right."""
        x = self.pixels[index.to(self.pixels.device)].float() / 127.5 - 1
        return x if flipped is None else torch.where(flipped[:, None, None, None].to(x.device), x.flip(3), x)


def read(folder: str | Path, *, test: bool = False) -> Pictures:
    """What the folder has; of CIFAR-10 the training pictures, or those of the test."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"data: there is no folder {root}; --download fetches CIFAR-10 to it")
    for below in ("", "cifar-10-batches-bin", "cifar-10-batches-py"):
        here = root / below
        for pattern, reader in (("*_batch*.bin", _binary), ("*_batch*.bin.xz", _binary), ("*_batch*", _python)):
            files = [f for f in sorted(here.glob(pattern)) if f.name.startswith("test") == test and f.is_file()]
            if files and (reader is _binary or all(not f.suffix for f in files)):
                return _cifar(files, reader)
    return _folder(root)


def _cifar(files: Sequence[Path], reader: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> Pictures:
    labels, pixels = (np.concatenate(part) for part in zip(*map(reader, files), strict=True))
    return Pictures(torch.from_numpy(pixels).view(-1, 3, SIDE, SIDE), torch.from_numpy(labels).long(), CLASSES)


def _binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and bytes (n, 3072)."""
    try:
        data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    except (lzma.LZMAError, EOFError) as wrong:
        raise ValueError(f"data: {file} is cut short or no xz file ({wrong}); copy it again") from wrong
    if not data or len(data) % RECORD:
        raise ValueError(
            f"data: {file} has {len(data)} bytes, which is no number of records of {RECORD} (a label and "
            f"{SIDE} x {SIDE} x 3): it is cut short, or not of CIFAR-10's binary version"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return _labelled(file, records[:, 0]), records[:, 1:].copy()


def _python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = _Arrays(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        labels, pixels = np.asarray(found[b"labels"], np.int64), np.asarray(found[b"data"], np.uint8)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as wrong:
        raise ValueError(f"data: {file} is cut short or not of CIFAR-10's python version ({wrong})") from wrong
    if pixels.shape != (len(labels), RECORD - 1):
        raise ValueError(f"data: {file} has pictures of shape {pixels.shape}, and {len(labels)} labels")
    return _labelled(file, labels), pixels


def _labelled(file: Path, labels: np.ndarray) -> np.ndarray:
    if bad := [(i, int(v)) for i, v in enumerate(labels) if not 0 <= v < len(CLASSES)]:
        raise ValueError(f"data: {file}, record {bad[0][0]} has the label {bad[0][1]}, not one of 0 ... 9")
    return labels.copy()


class _Arrays(pickle.Unpickler):
    """Makes arrays, and nothing else that a pickle may ask for."""

    KNOWN = ("ndarray", "dtype", "_reconstruct", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.KNOWN or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _folder(root: Path) -> Pictures:
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in KINDS)
    if not files:
        raise ValueError(
            f"data: {root} has neither CIFAR-10 (*_batch*.bin, *_batch*.bin.xz, cifar-10-batches-py) nor pictures "
            f"({', '.join(KINDS)})"
        )
    names = tuple(sorted({f.parent.name for f in files if f.parent != root}))
    pictures: list[np.ndarray] = []
    for file in tqdm(files, "pictures", disable=len(files) < 1000):
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        except (UnidentifiedImageError, OSError) as wrong:
            raise ValueError(f"data: {file} cannot be read ({wrong})") from wrong
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{p.shape[1]} x {p.shape[0]}" for p in (pictures[-1], pictures[0])]
            raise ValueError(f"data: {file} is {sizes[0]} where {files[0].name} is {sizes[1]}: bring all to one size")
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([names.index(f.parent.name) for f in files]) if all(f.parent != root for f in files) else None
    return Pictures(pixels, labels, names)


def read_or_download(folder: str | Path, wanted: bool) -> Pictures:
    """What the folder has; CIFAR-10 is fetched to it if that is `wanted`, and there is nothing yet."""
    root = Path(folder)
    if wanted and not (root.is_dir() and any(root.iterdir())):
        download(root)
    return read(root)


def download(folder: str | Path) -> None:
    """CIFAR-10's binary version (Krizhevsky 2009), checked by its md5 before anything of it is written."""
    root = Path(folder)
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer:
            size, data = int(answer.headers.get("Content-Length", 0)), bytearray()
            with tqdm(total=size, unit="B", unit_scale=True, desc="CIFAR-10") as bar:
                while part := answer.read(1 << 16):
                    data += part
                    bar.update(len(part))
    except OSError as wrong:
        raise ValueError(
            f"data: {URL} cannot be reached ({wrong}); fetch it elsewhere and unpack it in {root}"
        ) from wrong
    if (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != MD5:
        raise ValueError(f"data: {URL} came with md5 {found}, and should have {MD5}: try again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(root, filter="data")
