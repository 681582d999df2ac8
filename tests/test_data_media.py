"""Images and videos of rows: where they may be, and which pixels a model gets."""

import base64
import os
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from pvm.data.encoding import ConversationEncoder
from pvm.data.forms import Conversation
from pvm.data.media import media_file, read_image, read_video
from pvm.errors import UserError


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"
COLOUR = (200, 100, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """a.png, and images.zip with images/a.png."""
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (8, 4), COLOUR).save(folder / "a.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(folder / "a.png", "images/a.png")
    return folder


def png(folder: Path) -> bytes:
    return (folder / "a.png").read_bytes()


def pixels(file: bytes | Image.Image, file_format: str = "PNG", **options) -> np.ndarray:
    """What a model gets of an image file, `[height, width, 3]`."""
    if isinstance(file, Image.Image):
        content = BytesIO()
        file.save(content, file_format, **options)
        file = content.getvalue()
    return np.asarray(read_image(media_file(file, "image")))


# Where


@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        "./sub/../a.png",
        lambda folder: str(folder / "a.png"),
        lambda folder: (folder / "a.png").as_uri(),
        lambda folder: f"file://localhost{folder}/a%2Epng",
        "file:a.png",
        "images.zip/images/a.png",
        lambda folder: png(folder),
        lambda folder: {"path": None, "bytes": png(folder)},
        lambda folder: {"path": "elsewhere.png", "bytes": png(folder)},
        {"path": "a.png", "bytes": None},
        lambda folder: f"data:image/png;base64,{base64.b64encode(png(folder)).decode()}",
        lambda folder: f"DATA:image/png;BASE64,{base64.b64encode(png(folder)).decode()}",
    ],
)
def test_where_an_image_may_be(folder, value):
    (folder / "sub").mkdir(exist_ok=True)
    file = media_file(value(folder) if callable(value) else value, "image", folder)
    assert np.array_equal(np.asarray(read_image(file)), np.full((4, 8, 3), COLOUR))


def test_a_zip_file_may_be_the_root(folder):
    assert read_image(media_file("images/a.png", "image", folder / "images.zip")).size == (8, 4)
    with pytest.raises(UserError, match="images.zip/images/b.png does not exist"):
        read_image(media_file("images/b.png", "image", folder / "images.zip"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.png", "no.png does not exist: check .* --image_root, .* zip file .*, such as .*images.zip"),
        ("no/where/no.png", "such as .*images.zip"),
        ("pipe.png", "pipe.png is not a file, but a folder, pipe or device"),
        ("/dev/zero", "is not a file, but"),
        (".", "is not a file, but"),
        ("x" * 5000, "xx' cannot be read: .*File name too long"),
        ("a\0.png", "cannot be read: .*null byte"),
        ("a.png/b.png", "cannot be read from .*a.png: File is not a zip file"),
        ("zzz.zip/b.png", "cannot be read from .*zzz.zip: "),
        ("empty.png", "its format is not known"),
        ("file://elsewhere/a.png", "is on another machine"),
        ("file://[a.png", "is not a valid file: URI"),
        ("/dev/null/a.png", "does not exist"),
        ("pipe.png/a.png", "does not exist"),
        ("data:image/png;base64,%%%", "is not a valid data: URI: Only base64 data"),
        ("data:image/png", "is not a valid data: URI: it has no comma"),
        ("data:,", "an empty data: URI"),
        ("data:image/png;base64,AAAA", "the image in the row cannot be read: its format is not known"),
        ("http://127.0.0.1:9/a.png", "is a URL, .*--allow_image_urls true"),
        ("HTTPS://127.0.0.1:9/a.png", "is a URL, .*--allow_image_urls true"),
        ("hf://datasets/a/b/c.png", "is a URL, .*--allow_image_urls true"),
        ("zip://a.png::http://127.0.0.1:9/a.zip", "is a URL that cannot be read"),
        ("s3://bucket/a.png", "is a URL that cannot be read"),
        (" http://127.0.0.1:9/a.png", "is a URL that cannot be read"),
        (b"", "one of the images is empty"),
        (7, "neither a path nor a file"),
    ],
)
def test_where_an_image_may_not_be(folder, value, message):
    if not (folder / "pipe.png").exists():
        os.mkfifo(folder / "pipe.png")
        (folder / "empty.png").touch()
        (folder / "zzz.zip").write_bytes((folder / "images.zip").read_bytes()[:90])
    with pytest.raises(UserError, match=message) as error:
        read_image(media_file(value, "image", folder))
    assert len(str(error.value)) < 700 and " at 0x" not in str(error.value)


def test_urls_are_fetched_only_if_they_are_allowed(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.png"
    try:
        with pytest.raises(UserError, match="is a URL"):
            media_file(url, "image", folder)
        assert requests == []
        assert read_image(media_file(url, "image", folder, allow_urls=True)).size == (8, 4)
        with pytest.raises(UserError, match="b.png cannot be fetched"):
            read_image(media_file(url.replace("a.png", "b.png"), "image", folder, allow_urls=True))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="c.png cannot be fetched: Offline mode"):
            read_image(media_file(url.replace("a.png", "c.png"), "image", folder, allow_urls=True))
        assert not any("c.png" in path for path in requests)
        with pytest.raises(UserError, match="the video .* is a URL that cannot be read"):
            media_file(url, "video", folder, allow_urls=True)
    finally:
        server.shutdown()
        server.server_close()


# Pixels


RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # 0 to 1


@pytest.mark.parametrize(
    ("values", "file_format"),
    [
        ((RAMP * 65535).round().astype(np.uint16), "PNG"),
        ((RAMP * 65535).round().astype(np.uint16), "TIFF"),
        ((RAMP * 65535).round().astype(">u2"), "TIFF"),
        ((RAMP * 65535).round().astype(np.uint16), "PPM"),  # read into 32 bits
        ((RAMP * 65535).round().astype(np.int32), "TIFF"),
        ((RAMP * 255).round().astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
        ((RAMP * 1e6).astype(np.float32), "TIFF"),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF"),
        ((RAMP * 3e6 - 1e6).astype(np.int32), "TIFF"),
    ],
)
def test_more_than_8_bits_are_scaled(values, file_format):
    expected = (RAMP * 255).round()
    found = pixels(Image.fromarray(values), file_format)
    assert found.shape == (8, 8, 3) and np.abs(found - expected[..., None]).max() <= 1
    assert found.min() == 0 and found.max() == 255


def test_16_bits_keep_their_brightness_and_32_bits_need_not_be_finite():
    dark = np.array([[0, 257, 514]], np.uint16)
    for file_format in ("PNG", "TIFF", "PPM"):
        assert pixels(Image.fromarray(dark), file_format)[0, :, 0].tolist() == [0, 1, 2]
    odd = np.array([[0.5, np.nan, np.inf, -np.inf]], np.float32)
    assert pixels(Image.fromarray(odd), "TIFF")[0, :, 0].tolist() == [128, 0, 255, 0]
    constant = np.full((2, 2), 128, np.float32)
    assert (pixels(Image.fromarray(constant), "TIFF") == 128).all()
    with pytest.raises(UserError, match="cannot be read: none of its pixels is a finite number"):
        pixels(Image.fromarray(constant * np.nan), "TIFF")


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """A red (in gray, black) pixel beside one that is red or black, but transparent."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255) if mode in ("RGBA", "P", "RGB") else (0, 0, 0, 255))
    image.putpixel((1, 0), (*image.getpixel((0, 0))[:3], 0))
    if mode in ("RGBA", "LA"):
        return image.convert(mode), {}
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 1)
    if mode == "P":
        image.putpalette([255, 0, 0, 1, 1, 1])
    if mode == "RGB":
        image.putpixel((0, 0), (255, 0, 0))
    return image, {"transparency": (9, 9, 9) if mode == "RGB" else 1}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_transparent_pixels_are_white(mode):
    image, options = transparent(mode)
    opaque, hidden = pixels(image, **options)[0].tolist()
    assert opaque == ([255, 0, 0] if mode in ("RGBA", "P", "RGB") else [0, 0, 0]) and hidden == [255, 255, 255]


def test_half_transparent_pixels_are_mixed_with_white():
    assert pixels(Image.new("RGBA", (1, 1), (255, 0, 0, 51)))[0, 0].tolist() == [255, 204, 204]
    assert (pixels(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "WEBP", lossless=True) == 255).all()
    assert (pixels(Image.new("P", (2, 2), 0), "GIF", transparency=0) == 255).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(file_format, orientation):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :32], upright[16:, 32:] = 255, 128  # top left, bottom right
    # Stored so that the viewer has to undo it.
    stored = [
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T, upright.T[::-1],
        upright.T[::-1, ::-1], upright.T[:, ::-1],
    ][orientation - 1]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif)[..., 0]
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    assert (pixels(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG") == 255).all()


# Videos


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BACKBONE)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (3, 40), (40, 3), (4, 1)])
def test_small_videos_keep_their_colours(processor, size):
    """Frames of 1 or 3 pixels look like channels."""
    frames = []
    for _ in range(2):
        content = BytesIO()
        Image.new("RGB", size, COLOUR).save(content, "PNG")
        frames.append({"path": None, "bytes": content.getvalue()})
    frames, _ = read_video({"path": None, "bytes": None, "frames": frames}, processor.video_processor)
    assert frames.shape == (2, 3, size[1], size[0]) and frames[0, :, 0, 0].tolist() == list(COLOUR)

    messages = [
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    ]
    images = []
    for shape in (size, (32, 32)):  # of one colour, so that all patches are equal
        content = BytesIO()
        Image.new("RGB", shape, COLOUR).save(content, "PNG")
        images.append({"path": None, "bytes": content.getvalue()})
    small, large = (
        ConversationEncoder(processor)(
            Conversation(messages, videos=[{"path": None, "bytes": None, "frames": [image] * 2}])
        )["pixel_values_videos"]
        for image in images
    )
    assert (small - large[:1]).abs().max() < 0.02
