"""Fashion-MNIST and CIFAR, read from bytes in their formats."""

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regard.data.cifar import load_cifar10, load_cifar100, load_restricted
from regard.data.fashion_mnist import CLASSES, load_fashion_mnist


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    arrays = {}
    for prefix, number in (("train", 20), ("t10k", 6)):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = random.integers(0, 10, number, dtype=np.uint8)
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path, arrays


def test_fashion_mnist_is_read(fashion):
    folder, arrays = fashion
    dataset = load_fashion_mnist("test", folder)
    assert dataset.features["label"].names == list(CLASSES)
    assert dataset["label"][:] == arrays["t10k-labels-idx1-ubyte.gz"].tolist()
    sample: Any
    for sample, pixels in zip(dataset, arrays["t10k-images-idx3-ubyte.gz"], strict=True):
        assert sample["pixel_values"].mode == "L"
        assert np.array_equal(np.asarray(sample["pixel_values"]), pixels)


def images_of(dataset: Any) -> list[bytes]:
    return [image.tobytes() for image in dataset["pixel_values"]]


def test_validation_is_held_out_by_seed(fashion):
    folder, arrays = fashion
    settings = {"folder": folder, "validation_size": 5}
    train, validation = (images_of(load_fashion_mnist(split, **settings)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (15, 5)
    assert {*train, *validation} == {image.tobytes() for image in arrays["train-images-idx3-ubyte.gz"]}
    assert images_of(load_fashion_mnist("validation", **settings)) == validation
    assert images_of(load_fashion_mnist("validation", **settings, seed=1)) != validation
    with pytest.raises(ValueError, match="val"):
        load_fashion_mnist("val", folder)
    with pytest.raises(ValueError, match="validation_size"):
        load_fashion_mnist("train", folder, validation_size=20)


def test_missing_fashion_mnist_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"<html>",
        lambda content: content[:30] + bytes((content[30] ^ 255,)) + content[31:],
        lambda content: gzip.compress(b"\0\0\x0d\3" + gzip.decompress(content)[4:]),
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
        lambda content: gzip.compress(idx(np.zeros((5, 28, 28), np.uint8))),
    ],
    ids=["cut", "empty", "no gzip", "flipped", "no bytes", "short", "another number"],
)
def test_damaged_fashion_mnist_names_the_package(fashion, damage):
    folder, _ = fashion
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="apt-get install --reinstall dataset-fashion-mnist"):
        load_fashion_mnist("test", folder)


# As Python 2 wrote an array of bytes in protocol 2, opcode by opcode.
def python2_text(content: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(content)) + content


def python2_array(array: np.ndarray) -> bytes:
    shape = b"".join(b"J" + struct.pack("<i", side) for side in array.shape)
    dtype = b"cnumpy\ndtype\n" + python2_text(b"u1") + b"K\0K\1\x87R"
    dtype += b"(K\3" + python2_text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + python2_text(b"b") + b"\x87R"
    return made + b"(K\1(" + shape + b"t" + dtype + b"\x89" + python2_text(array.tobytes()) + b"tb"


def python2_list(values: list) -> bytes:
    items = [b"K" + bytes((v,)) if isinstance(v, int) else python2_text(v) for v in values]
    return b"](" + b"".join(items) + b"e"


def python2_dict(entries: dict[bytes, Any]) -> bytes:
    body = b""
    for key, value in entries.items():
        body += python2_text(key) + (python2_array(value) if isinstance(value, np.ndarray) else python2_list(value))
    return b"\x80\2}(" + body + b"u."


def batch(seed: int, number: int, key: bytes, classes: int) -> dict[bytes, Any]:
    random = np.random.default_rng(seed)
    return {
        b"data": random.integers(0, 256, (number, 3072), dtype=np.uint8),
        key: random.integers(0, classes, number).tolist(),
    }


def cifar10(write: Any) -> dict[str, bytes]:
    batches = {f"data_batch_{i}": batch(i, 4, b"labels", 10) for i in range(1, 6)} | {
        "test_batch": batch(6, 3, b"labels", 10)
    }
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    return {name: write(content) for name, content in ({**batches, "batches.meta": {b"label_names": names}}).items()}


def python3_pickle(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("write", [python2_dict, python3_pickle])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_cifar10_is_read(tmp_path, write, packed):
    source = tmp_path / "cifar-10-batches-py"
    source.mkdir()
    for name, content in cifar10(write).items():
        (source / name).write_bytes(content)
    if packed:
        archive = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source, source.name)
        source = archive
    dataset = load_cifar10("test", source)
    expected = batch(6, 3, b"labels", 10)
    assert dataset["label"][:] == expected[b"labels"]
    assert dataset.features["label"].names[3] == "cat"
    image = np.asarray(dataset[1]["pixel_values"])
    assert np.array_equal(image[:, :, 2].ravel(), expected[b"data"][1, 2048:])  # the third plane is blue
    train, validation = (load_cifar10(split, source, validation_size=5) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (15, 5)
    assert not set(images_of(train)) & set(images_of(validation))


def test_cifar100_is_read(tmp_path):
    for name, number in (("train", 6), ("test", 3)):
        (tmp_path / name).write_bytes(python2_dict(batch(number, number, b"fine_labels", 100)))
    (tmp_path / "meta").write_bytes(python2_dict({b"fine_label_names": [b"c%d" % i for i in range(100)]}))
    dataset = load_cifar100("test", tmp_path)
    assert dataset["label"][:] == batch(3, 3, b"fine_labels", 100)[b"fine_labels"]
    assert dataset.features["label"].num_classes == 100
    assert len(load_cifar100("train", tmp_path, validation_size=2)) == 4


class Malicious:
    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Malicious(os.system, "touch owned")),
        pickle.dumps(Malicious(eval, "open('owned', 'w')")),
        pickle.dumps({b"data": [Malicious(os.mkdir, "owned")]}),
        pickle.dumps(Malicious(np.fromfile, "owned")),
        b"cnumpy\nload\n(S'owned'\ntR.",
        b"cnumpy\nndarray\n((J\xff\xff\xff\x7ftR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"c_codecs\nencode\n(Vx\nVzip\ntR.",
    ],
)
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        load_restricted(content)
    assert not list(tmp_path.iterdir())
    for name in cifar10(python2_dict):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged .* fetch it again"):
        load_cifar10("test", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_missing_or_damaged_cifar_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cs\.toronto\.edu"):
        load_cifar10("test", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"lacks batches\.meta, test_batch"):
        load_cifar10("test", tmp_path)
    archive = tmp_path / "cut.tar.gz"
    archive.write_bytes(gzip.compress(b"x" * 2000)[:20])
    with pytest.raises(ValueError, match="fetch it again"):
        load_cifar10("test", archive)
    files = cifar10(python2_dict)
    wrong = {
        "test_batch": [
            files["test_batch"][:-2000],
            python2_dict({b"data": np.zeros((3, 5), np.uint8), b"labels": [1, 2, 3]}),
            python2_dict({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2]}),
            python2_dict({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
            python2_dict({b"labels": [1]}),
            io.BytesIO().getvalue(),
        ]
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for content in wrong["test_batch"]:
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match="test_batch is damaged"):
            load_cifar10("test", tmp_path)
