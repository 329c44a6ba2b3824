"""scale/data.py: every layout gives the same pictures, and a broken file says what is wrong with it."""

import hashlib
import io
import lzma
import pathlib
import pickle
import tarfile
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from scale import data
from scale.data import CLASSES, RECORD, read


@pytest.fixture
def records():
    """Twenty records, as bytes: two of each class."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, RECORD - 1), np.uint8)
    return np.concatenate([np.arange(20, dtype=np.uint8)[:, None] % 10, pixels], 1)


def binary(folder, records, xz=False):
    """Two files to train on, one to test with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("data_batch_1", records[:10]), ("data_batch_2", records[10:15]), ("test_batch", records[15:])):
        raw = part.tobytes()
        (folder / f"{name}.bin{'.xz' * xz}").write_bytes(lzma.compress(raw) if xz else raw)
    return folder


def python(folder, records):
    """As torchvision's root has it: pickles of the second protocol."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name, part in (("data_batch_1", records[:15]), ("test_batch", records[15:])):
        held = {b"labels": part[:, 0].tolist(), b"data": part[:, 1:].copy(), b"batch_label": b"it"}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(held, protocol=2))
    (folder / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({b"label_names": []}))
    return folder


def pictures(folder, records):
    """A folder for each class; sorted by class and number."""
    for i, record in enumerate(records[:15]):
        where = folder / CLASSES[record[0]]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(where / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("layout", ["binary", "xz", "below", "python"])
def test_every_layout_of_cifar_gives_the_same(layout, records, tmp_path):
    make = {
        "binary": binary, "xz": lambda *a: binary(*a, xz=True), "python": python,
        "below": lambda folder, r: binary(folder / "cifar-10-batches-bin", r).parent,
    }[layout]  # fmt: skip
    found, test = read(make(tmp_path / "d", records)), read(tmp_path / "d", test=True)
    for part, held in ((records[:15], found), (records[15:], test)):
        assert held.pixels.dtype == torch.uint8 and held.pixels.shape == (len(part), 3, 32, 32)
        assert held.pixels.flatten(1).tolist() == part[:, 1:].tolist()
        assert held.labels.tolist() == part[:, 0].tolist()
    assert found.classes == CLASSES


def test_a_folder_of_pictures(records, tmp_path):
    """Classes are folders; without them there are no labels."""
    found = read(pictures(tmp_path / "d", records))
    order = sorted(range(15), key=lambda i: (CLASSES[records[i, 0]], i))
    assert found.pixels.flatten(1).tolist() == records[order][:, 1:].tolist()
    assert [found.classes[i] for i in found.labels] == [CLASSES[records[i, 0]] for i in order]
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (5, 4), 255).save(flat / "a.png")
    found = read(flat)
    assert found.labels is None and found.pixels.shape == (1, 3, 4, 5) and len(found) == 1


def test_a_batch_lies_between_minus_one_and_one(records, tmp_path):
    found = read(binary(tmp_path, records))
    index, flipped = torch.tensor([3, 1, 3]), torch.tensor([False, True, True])
    x = found.batch(index, flipped)
    assert x.dtype == torch.float32 and float(x.min()) >= -1 and float(x.max()) <= 1
    back = ((x + 1) * 127.5).round().byte()
    assert torch.equal(back[0], found.pixels[3])
    assert torch.equal(back[1], found.pixels[1].flip(2)) and torch.equal(back[2], found.pixels[3].flip(2))
    assert torch.equal(found.batch(index), torch.stack([x[0], x[1].flip(2), x[0]]))


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            r"data_batch_1.bin has 30729 bytes, which is no number of records",
        ),
        (lambda f: f.write_bytes(b""), "has 0 bytes"),
        (lambda f: f.write_bytes(bytes([11]) + f.read_bytes()[1:]), "record 0 has the label 11, not one of 0 ... 9"),
        (lambda f: f.rename(f.with_suffix(".bin.xz")), "is cut short or no xz file|no number of records"),
    ],
)
def test_a_broken_file_says_so(harm, message, records, tmp_path):
    folder = binary(tmp_path, records)
    (folder / "data_batch_2.bin").unlink()
    harm(folder / "data_batch_1.bin")
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_an_xz_file_that_is_cut_short_says_so(records, tmp_path):
    file = binary(tmp_path, records, xz=True) / "data_batch_1.bin.xz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is cut short or no xz file"):
        read(tmp_path)


def test_a_pickle_makes_nothing_but_arrays(records, tmp_path):
    class Payload:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "hacked",))

    file = python(tmp_path, records) / "cifar-10-batches-py" / "data_batch_1"
    for held, message in (({b"labels": [], b"data": Payload()}, "which is no array"), ([1], "python version")):
        file.write_bytes(pickle.dumps(held, protocol=2))
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    file.write_bytes(b"\x80")
    with pytest.raises(ValueError, match="cut short"):
        read(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .* --download fetches"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has neither CIFAR-10 .* nor pictures"):
        read(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 5 x 4 where a\.png is 4 x 4: bring all to one size"):
        read(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read(tmp_path)


class Answer(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012


def test_a_download_is_checked_before_it_is_unpacked(records, tmp_path, monkeypatch):
    folder = binary(tmp_path / "source" / "cifar-10-batches-bin", records)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    sent = stream.getvalue()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(sent))
    with pytest.raises(ValueError, match="came with md5"):
        data.download(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(data, "MD5", hashlib.md5(sent).hexdigest())
    data.download(tmp_path / "d")
    assert len(read(tmp_path / "d")) == 15

    def out_of_reach(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", out_of_reach)
    with pytest.raises(ValueError, match=r"cannot be reached \(no route\); fetch it elsewhere"):
        data.download(tmp_path / "e")
