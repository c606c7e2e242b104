"""Web fonts of npm's registry, here one on loopback: checksums, what is there already, what cannot be fetched;
and that none looks like a font to test with."""

import base64
import functools
import hashlib
import io
import json
import tarfile
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from regard.data import web_fonts
from regard.data.rendered_text import FONTS_DIRS, FONTS_TABLE, RenderedTextDataset


def archive_of(names: list[str]) -> bytes:
    """A package of Pillow's own font, as WOFF."""
    own = ImageFont.load_default(10)
    assert isinstance(own, ImageFont.FreeTypeFont)
    font, packed, archive = TTFont(io.BytesIO(own.font_bytes)), io.BytesIO(), io.BytesIO()
    font.flavor = "woff"
    font.save(packed)
    with tarfile.open(fileobj=archive, mode="w:gz") as members:
        for name in names:
            member = tarfile.TarInfo(f"package/files/{name}.woff")
            member.size = len(packed.getvalue())
            members.addfile(member, io.BytesIO(packed.getvalue()))
    return archive.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Address of a registry with a good, a damaged and an incomplete package, after an unknown one."""
    rows = []
    for name in ("unknown", "good", "damaged", "incomplete"):
        files = [f"{name}-latin-{weight}-normal" for weight in (400, 700)]
        archive = archive_of(files[: 1 if name == "incomplete" else 2])
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
        package = {"family": name, "split": "train", "package": f"@fontsource/{name}@1.2.3", "integrity": integrity}
        rows.append(package | {"files": [f"{file}.ttf" for file in files]})
        path = tmp_path / f"registry/@fontsource/{name}/-/{name}-1.2.3.tgz"
        path.parent.mkdir(parents=True)
        if name != "unknown":
            path.write_bytes(archive + b"!" * (name == "damaged"))
    table = tmp_path / "table.json"
    debian = {"family": "Debian's", "split": "test", "package": "fonts-own", "files": ["own.ttf"]}
    table.write_text(json.dumps([debian, *rows]))
    monkeypatch.setattr(web_fonts, "FONTS_TABLE", table)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "registry"))
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_bad_package_does_not_stop_the_rest(registry, tmp_path, capsys):
    folder = tmp_path / "fonts"
    assert web_fonts.main([str(folder), "--registry", registry]) == 1
    output = capsys.readouterr()
    assert "1 of 4 families" in output.out
    for message in (
        "@fontsource/unknown@1.2.3: HTTP Error 404",
        "damaged-1.2.3.tgz: the checksum is not the table's",
        "does not hold incomplete-latin-700-normal.woff",
    ):
        assert message in output.err
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.ttf" for name in ("good-latin-400-normal", "good-latin-700-normal",
                                                "incomplete-latin-400-normal")}  # fmt: skip
    data = RenderedTextDataset("train", fonts_dirs=[folder], fonts_table=web_fonts.FONTS_TABLE)
    assert data[0]["font"] in names


def test_what_is_there_is_not_fetched_again(registry, tmp_path):
    (row,) = [row for row in json.loads(Path(web_fonts.FONTS_TABLE).read_text()) if row["family"] == "good"]
    web_fonts.fetch(row, tmp_path, registry)
    web_fonts.fetch(row, tmp_path, "http://127.0.0.1:1")
    (tmp_path / row["files"][1]).unlink()
    with pytest.raises(OSError, match="refused"):
        web_fonts.fetch(row, tmp_path, "http://127.0.0.1:1")


LETTERS = "abdefghijklmnpqrtuyABDEFGHJKLMNPQRSTUVWXYZ0123456789&@?"  # but for those that all fonts draw alike


def shapes(path: Path) -> np.ndarray:
    """Each letter's ink, scaled to one box, `(letters, pixels)`."""
    font, rows = ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC), []
    for letter in LETTERS:
        image = Image.new("L", (160, 160))
        ImageDraw.Draw(image).text((40, 110), letter, fill=255, font=font, anchor="ls")
        box = image.getbbox()
        assert box is not None, f"{path} does not draw {letter}"
        rows.append(np.asarray(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR), np.float32).ravel())
    return np.stack(rows)


def test_no_web_font_looks_like_a_font_of_another_split():
    table = json.loads(FONTS_TABLE.read_text("utf-8"))
    here = {path.name: path for folder in FONTS_DIRS for path in Path(folder).expanduser().rglob("*.[ot]tf")}
    held, web = [], []
    for row in table:
        fonts = [here[name] for name in row["files"] if name in here]
        if row["split"] != "train":
            held += [shapes(path) for path in fonts]
        elif "integrity" in row:
            web += fonts
    if not held or not web:
        pytest.skip("needs `make fonts web-fonts`")
    others = np.stack(held)
    for path in web:
        own = shapes(path)
        overlap = (np.minimum(others, own).sum(2) / np.maximum(others, own).sum(2)).mean(1)
        assert overlap.max() < 0.89, path.name
