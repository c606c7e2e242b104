"""Real files of every troublesome kind: read right, or refused by name."""

import base64
import errno
import functools
import http.server
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from regard.processing import image_io
from regard.processing.image_io import ImageReadError, find_images, open_image, to_8_bit, to_grey_or_rgb


def ramp(width=64, height=16):
    return np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))


def levels(image):
    return np.asarray(image).astype(int)


class TestOpenImage:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".gif", ".pgm", ".tga", ".jp2"])
    def test_grey_files(self, tmp_path, suffix):
        path = tmp_path / f"grey{suffix}"
        Image.fromarray(ramp()).save(path, lossless=True)  # a matter of WebP, unknown to the others
        image = open_image(path)
        assert image.mode in ("L", "RGB")
        assert image.size == (64, 16)
        np.testing.assert_array_equal(levels(image.convert("L")), ramp())

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
    def test_colour_files(self, tmp_path, suffix):
        path = tmp_path / f"colour{suffix}"
        Image.new("RGB", (31, 17), (200, 100, 50)).save(path, quality=100)
        image = open_image(str(path))
        assert (image.mode, image.size) == ("RGB", (31, 17))
        assert abs(levels(image) - [200, 100, 50]).max() <= 3

    def test_sources(self, tmp_path):
        path = tmp_path / "a.png"
        Image.fromarray(ramp()).save(path)
        content = path.read_bytes()
        address = "data:image/png;base64," + base64.b64encode(content).decode()
        with Image.open(path) as opened:
            for source in (path, str(path), content, address, opened):
                np.testing.assert_array_equal(levels(open_image(source)), ramp())
        with pytest.raises(TypeError, match="not int"):
            open_image(3)  # pyright: ignore[reportArgumentType]

    def test_address(self, tmp_path):
        Image.fromarray(ramp()).save(tmp_path / "a.png")
        handler = functools.partial(QuietHandler, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            np.testing.assert_array_equal(levels(open_image(f"{address}/a.png")), ramp())
            with pytest.raises(ImageReadError, match=r"missing\.png: cannot be fetched .*404.*check the address"):
                open_image(f"{address}/missing.png")
            server.shutdown()
        with pytest.raises(ImageReadError, match="cannot be fetched"):
            open_image(f"{address}/a.png")

    def test_file_is_closed_and_pixels_stay(self, tmp_path):
        path = tmp_path / "a.jpg"
        Image.new("RGB", (40, 40), "red").save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            image = open_image(path)
            path.unlink()
            assert image.resize((4, 4)).size == (4, 4)

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_16_bit(self, tmp_path, suffix):
        deep = ramp().astype(np.uint16) * 257
        Image.fromarray(deep).save(tmp_path / f"deep{suffix}")
        image = open_image(tmp_path / f"deep{suffix}")
        assert image.mode == "L"
        np.testing.assert_array_equal(levels(image), ramp())

    def test_16_bit_colour(self, tmp_path):
        path = tmp_path / "deep.png"
        path.write_bytes(png_file(8, 4, 16, 2, struct.pack(">3H", 65535, 32896, 0) * 8))
        image = open_image(path)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(levels(image)[0, 0], [255, 128, 0])

    def test_12_bits_in_a_16_bit_file(self, tmp_path):
        Image.fromarray(ramp().astype(np.uint16) * 16).save(tmp_path / "sensor.tif")
        np.testing.assert_array_equal(levels(open_image(tmp_path / "sensor.tif")), ramp())

    def test_32_bit_and_float(self, tmp_path):
        Image.fromarray(ramp().astype(np.int32) * 2**20).save(tmp_path / "int.tif")
        np.testing.assert_array_equal(levels(open_image(tmp_path / "int.tif")), ramp())
        Image.fromarray(ramp().astype(np.float32) / 255).save(tmp_path / "float.tif")
        np.testing.assert_array_equal(levels(open_image(tmp_path / "float.tif")), ramp())

    def test_cmyk(self, tmp_path):
        colour = Image.new("RGB", (32, 32), (250, 40, 40)).convert("CMYK")
        for suffix in (".tif", ".jpg"):
            path = tmp_path / f"print{suffix}"
            colour.save(path, quality=100)
            image = open_image(path)
            assert image.mode == "RGB"
            assert abs(levels(image) - [250, 40, 40]).max() <= 4

    @pytest.mark.parametrize("suffix", [".png", ".gif"])
    def test_palette(self, tmp_path, suffix):
        image = Image.new("P", (4, 2), 1)
        image.putpalette([0, 0, 0, 10, 200, 30])
        image.save(tmp_path / f"palette{suffix}")
        assert levels(open_image(tmp_path / f"palette{suffix}").convert("RGB"))[0, 0].tolist() == [10, 200, 30]

    @pytest.mark.parametrize("suffix", [".png", ".gif"])
    def test_palette_with_transparency(self, tmp_path, suffix):
        image = Image.new("P", (4, 2), 1)
        image.putpixel((0, 0), 0)
        image.putpalette([0, 0, 0, 10, 200, 30])
        image.save(tmp_path / f"palette{suffix}", transparency=0)
        opened = open_image(tmp_path / f"palette{suffix}")
        assert opened.mode == "RGB"
        assert levels(opened)[0, :2].tolist() == [[255, 255, 255], [10, 200, 30]]

    def test_alpha_on_white(self, tmp_path):
        Image.new("RGBA", (2, 2), (0, 0, 255, 128)).save(tmp_path / "rgba.png")
        image = open_image(tmp_path / "rgba.png")
        assert image.mode == "RGB"
        assert abs(levels(image)[0, 0] - [127, 127, 255]).max() <= 1
        Image.new("LA", (2, 2), (0, 64)).save(tmp_path / "la.png")
        image = open_image(tmp_path / "la.png")
        assert image.mode == "L"
        assert abs(levels(image)[0, 0] - 191) <= 1
        Image.fromarray(ramp()).save(tmp_path / "key.png", transparency=0)
        image = open_image(tmp_path / "key.png")
        assert image.mode == "L"
        assert levels(image)[0, :2].tolist() == [255, ramp()[0, 1]]

    @pytest.mark.parametrize(
        "mode", "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L I;16N".split()
    )
    @pytest.mark.parametrize("grey_only", [False, True])
    def test_every_mode(self, mode, grey_only):
        converted = to_grey_or_rgb(Image.new(mode, (5, 3)), grey_only)
        assert converted.mode in (("L",) if grey_only else ("L", "RGB"))
        assert converted.size == (5, 3)

    def test_one_bit(self, tmp_path):
        Image.fromarray(ramp() > 128).save(tmp_path / "fax.tif", compression="group4")
        image = open_image(tmp_path / "fax.tif")
        assert image.mode == "L"
        np.testing.assert_array_equal(levels(image), np.where(ramp() > 128, 255, 0))

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
    def test_first_frame_of_an_animation(self, tmp_path, suffix):
        frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
        frames[0].save(tmp_path / f"moving{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        image = open_image(tmp_path / f"moving{suffix}")
        assert (image.mode, image.size) == ("RGB", (20, 10))
        assert levels(image)[5, 5].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
    def test_exif_rotation(self, tmp_path, orientation, suffix):
        upright = np.zeros((32, 48), dtype=np.uint8)
        upright[:16, :16] = 255
        turns = {
            1: lambda a: a,
            2: np.fliplr,
            3: lambda a: np.rot90(a, 2),
            4: np.flipud,
            5: np.transpose,
            6: lambda a: np.rot90(a, 1),
            7: lambda a: np.rot90(a, 2).T,
            8: lambda a: np.rot90(a, -1),
        }
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
        stored.save(tmp_path / f"turned{suffix}", exif=exif, quality=100)
        image = open_image(tmp_path / f"turned{suffix}")
        assert image.size == (48, 32)
        assert abs(levels(image) - upright).max() <= 10

    def test_exif_rotation_of_16_bits(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.rot90(ramp()).astype(np.uint16) * 257).save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(levels(open_image(tmp_path / "turned.png")), ramp())

    def test_damaged_exif_does_not_matter(self, tmp_path):
        Image.fromarray(ramp()).save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
        np.testing.assert_array_equal(levels(open_image(tmp_path / "a.png")), ramp())


class TestErrors:
    def check(self, path, *words):
        with pytest.raises(ImageReadError) as caught:
            open_image(path)
        for word in (str(path), *words):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing_folder_empty(self, tmp_path):
        self.check(tmp_path / "nowhere.png", "no such file", "check the path")
        self.check(tmp_path, "a folder", "find_images")
        (tmp_path / "empty.png").touch()
        self.check(tmp_path / "empty.png", "empty", "intact copy")

    def test_no_image(self, tmp_path):
        for name, content in {"text.png": b"hello " * 50, "zeros.jpg": bytes(1000), "page.svg": b"<svg/>"}.items():
            (tmp_path / name).write_bytes(content)
            self.check(tmp_path / name, "not an image", "convert it to PNG or JPEG")

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
    def test_cut_off(self, tmp_path, suffix, share):
        path = tmp_path / f"cut{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        self.check(path)

    def test_damaged(self, tmp_path):
        path = tmp_path / "damaged.png"
        Image.fromarray(ramp(200, 200)).save(path)
        content = bytearray(path.read_bytes())
        content[60:100] = bytes(40)
        path.write_bytes(content)
        self.check(path, "damaged or cut off", "intact copy")

    def test_postscript_is_not_run(self, tmp_path):
        Image.new("L", (9, 9)).save(tmp_path / "page.eps")
        self.check(tmp_path / "page.eps", "PostScript", "convert it to PNG")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_pipe_does_not_block(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        self.check(tmp_path / "pipe.png", "not a regular file")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user that can be refused")
    def test_permission(self, tmp_path):
        Image.new("L", (9, 9)).save(tmp_path / "a.png")
        (tmp_path / "a.png").chmod(0)
        self.check(tmp_path / "a.png", "check its permissions")

    def test_picture_given_as_an_object(self, tmp_path):
        path = tmp_path / "cut.png"
        Image.fromarray(ramp(200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:100])
        with Image.open(path) as image, pytest.raises(ImageReadError, match=r"cut\.png: damaged"):
            open_image(image)
        with pytest.raises(ImageReadError, match="PIL image 0x4: has no pixels"):
            open_image(Image.new("L", (0, 4)))


class TestHuge:
    """20,000 x 20,000 pixels are read, without Pillow's warning; images over the limit are refused by name."""

    @pytest.mark.parametrize("mode", ["L", "1"])
    def test_400_million_pixels(self, tmp_path, mode):
        path = tmp_path / "huge.png"
        image = Image.new(mode, (20_000, 20_000), 255)
        image.paste(0, (0, 0, 10_000, 20_000))
        image.save(path, compress_level=1)
        del image
        limit = Image.MAX_IMAGE_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_image(path)
        assert limit == Image.MAX_IMAGE_PIXELS
        assert (opened.mode, opened.size) == ("L", (20_000, 20_000))
        assert [opened.getpixel((x, x)) for x in (0, 9_999, 10_000, 19_999)] == [0, 0, 255, 255]

    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    def test_only_grey_is_kept(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(image_io, "GREY_ONLY_PIXELS", 1000)
        Image.new("RGB", (50, 40), (0, 255, 0)).save(tmp_path / f"large{suffix}")
        image = open_image(tmp_path / f"large{suffix}")
        assert (image.mode, image.size) == ("L", (50, 40))
        assert abs(levels(image) - 150).max() <= 2

    def test_transparency_is_laid_on_white_where_only_grey_is_kept(self, tmp_path, monkeypatch):
        Image.new("RGBA", (50, 40), (0, 255, 0, 128)).save(tmp_path / "large.png")
        expected = levels(open_image(tmp_path / "large.png").convert("L"))
        monkeypatch.setattr(image_io, "GREY_ONLY_PIXELS", 1000)
        image = open_image(tmp_path / "large.png")
        assert image.mode == "L"
        assert abs(levels(image) - expected).max() <= 1

    def test_over_the_limit(self, tmp_path):
        path = tmp_path / "bomb.png"
        path.write_bytes(png_file(100_000, 100_000, 8, 0, b""))
        with pytest.raises(
            ImageReadError, match=r"bomb\.png: 100000x100000, 10000 million pixels, .*500 million; scale"
        ):
            open_image(path)

    def test_limit_of_pillow_returns_after_errors_and_threads(self, tmp_path):
        limit = Image.MAX_IMAGE_PIXELS
        Image.fromarray(ramp(300, 300)).save(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"no image")

        def work():
            for _ in range(20):
                open_image(tmp_path / "a.png")
                with pytest.raises(ImageReadError):
                    open_image(tmp_path / "b.png")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert limit == Image.MAX_IMAGE_PIXELS


class TestTo8Bit:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (np.array([0, 7, 255], dtype=np.uint8), [0, 7, 255]),
            (np.array([False, True]), [0, 255]),
            (np.array([0, 256, 65535], dtype=np.uint16), [0, 1, 255]),
            (np.array([0, 200], dtype=np.int64), [0, 200]),
            (np.array([0, 0.5, 1]), [0, 128, 255]),
            (np.array([0, 100.4, 255], dtype=np.float16), [0, 100, 255]),
            (np.array([-10, 0, 10]), [0, 128, 255]),
            (np.array([0.0, np.nan, np.inf, 510.0]), [0, 0, 0, 255]),
            (np.array([-1.0, -1.0]), [0, 0]),
            (np.array([], dtype=np.int32), []),
        ],
    )
    def test_ranges(self, values, expected):
        result = to_8_bit(values)
        assert result.dtype == np.uint8
        assert result.tolist() == expected


class TestFindImages:
    def test_order_and_depth(self, tmp_path):
        for name in (
            "b10.png",
            "b2.PNG",
            "a.jpeg",
            "sub/c.webp",
            "sub/deep/1.tif",
            "notes.txt",
            ".hidden.png",
            ".git/x.png",
        ):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
        assert found == ["a.jpeg", "b2.PNG", "b10.png", "sub/c.webp", "sub/deep/1.tif"]

    def test_files_stay_in_order_whatever_they_are(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "1.png").touch()
        (tmp_path / "readme.txt").touch()
        paths = [tmp_path / "missing.png", tmp_path / "folder", str(tmp_path / "readme.txt")]
        assert find_images(paths) == [tmp_path / "missing.png", tmp_path / "folder" / "1.png", tmp_path / "readme.txt"]
        assert find_images(str(tmp_path / "readme.txt")) == [tmp_path / "readme.txt"]
        assert find_images([]) == []

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ImageReadError, match=r"no images in this folder; give one with files that end in .*\.png"):
            find_images(tmp_path)

    def test_a_subfolder_that_cannot_be_listed_leaves_the_rest(self, tmp_path, monkeypatch):
        (tmp_path / "1.png").touch()
        (tmp_path / "closed").mkdir()
        scandir = os.scandir

        def refuse(path):
            if Path(path).name == "closed":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        errors = []
        assert find_images(tmp_path, on_error=errors.append) == [tmp_path / "1.png"]
        assert [str(error) for error in errors] == [
            f"{tmp_path / 'closed'}: cannot list this folder (Permission denied); check its permissions"
        ]
        with pytest.raises(ImageReadError, match="closed: cannot list this folder"):
            find_images(tmp_path)

    def test_link_loops_end(self, tmp_path):
        (tmp_path / "1.png").touch()
        (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
        assert find_images(tmp_path) == [tmp_path / "1.png"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def png_file(width, height, depth, colour_type, row):
    """A PNG whose rows are all `row`, in any depth; without `row`, one that announces pixels and has none."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress((b"\x00" + row) * height if row else b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
