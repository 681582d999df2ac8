"""The images and videos of a row: found, read, and decoded as 8-bit RGB. All that is decoded is decoded here."""

import base64
import os
import stat
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from zipfile import ZipFile

import numpy as np
import PIL
import torch
from datasets import DownloadConfig, DownloadManager
from PIL import Image, ImageOps
from transformers import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from pvm.errors import SetupError, UserError


REMOTE = ("http", "https", "hf")  # schemes that `--allow_image_urls` allows
SHOWN = 200  # characters of a path in a message: it may be a whole file that was pasted there
SIXTEEN_BITS = 65535


def media_file(value: Any, kind: str, root: Path | None = None, allow_urls: bool = False) -> dict[str, Any]:
    """
    An image or video of a row as a file.

    Args:
        value (`str`, `bytes` or `dict`): a path, a `file:`, `data:` or http(s) URI, the bytes of a file, or
            `{"path", "bytes"}`, as `datasets` represents undecoded images.
        kind (`str`): "image" or "video".
        root (`Path`, *optional*): the folder or zip file that relative paths start from.
        allow_urls (`bool`): accept http(s) URLs of images.

    Returns:
        `dict`: `{"path": str | None, "bytes": bytes | None}`. The path is an absolute path or an allowed URL.

    Raises:
        UserError: if it is none of these.
    """
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(path, bytes):
        path, content = None, path
    if not isinstance(path, str | None) or not isinstance(content, bytes | None):
        raise UserError(f"one of the {kind}s is neither a path nor a file: {str(value)[:60]}.")
    if not path and not content:
        raise UserError(f"one of the {kind}s is empty.")
    if content is not None:
        return {"path": path, "bytes": content}

    scheme, shown = path.partition(":")[0].lower(), path[:SHOWN]
    if scheme == "data":
        return {"path": None, "bytes": _data(path, kind)}
    if scheme == "file":
        host, path = _file_uri(path, kind)
        if host not in ("", "localhost"):
            raise UserError(f"the {kind} {shown} is on another machine; name a file of this one.")
    elif "://" in path:
        if scheme not in REMOTE or kind != "image":
            raise UserError(f"the {kind} {shown} is a URL that cannot be read. Download the file and give its path.")
        if not allow_urls:
            raise UserError(
                f"the image {shown} is a URL, and a data set could make this machine call any address. Download the "
                "file, or fetch the URLs of a data set that you trust with --allow_image_urls true."
            )
        return {"path": path, "bytes": None}
    if not Path(path).is_absolute():
        if root is None:
            raise UserError(
                f"the {kind} {shown} is a relative path. Give the folder it starts from with --image_root."
            )
        path = str(root / path)
    return {"path": path, "bytes": None}


def read_image(file: dict[str, Any]) -> Image.Image:
    """
    Decode an image of a [`media_file`] as 8-bit RGB: upright (by its Exif orientation), with transparent pixels
    composited on white, and numbers of more than 8 bits scaled by the rule of [`scaled_to_8_bits`].

    Raises:
        UserError: if the file does not exist or cannot be decoded.
    """
    source = _source(file, "image")
    try:
        with Image.open(source) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError as error:  # its message shows the buffer's address
        raise UserError(f"the image {_name(file)} cannot be read: its format is not known.") from error
    except Exception as error:  # Pillow raises exceptions of many types for broken files
        raise UserError(f"the image {_name(file)} cannot be read: {error}") from error


def read_video(video: dict[str, Any], video_processor: BaseVideoProcessor) -> tuple[torch.Tensor, VideoMetadata]:
    """
    Decode a video of a `Conversation`. Files are sampled as the video processor specifies; a list of images is taken
    to be sampled at that rate already.

    Returns:
        Frames, uint8 `[frames, 3, height, width]`, and their metadata.

    Raises:
        UserError: if the file does not exist or cannot be decoded.
        SetupError: if PyAV is not installed.
    """
    if video["frames"] is not None:
        pictures = [read_image(frame) for frame in video["frames"]]
        if len({picture.size for picture in pictures}) > 1:
            raise UserError("the images of a video differ in size.")
        frames = np.stack([np.asarray(picture) for picture in pictures])
        metadata = VideoMetadata(len(frames), fps=video_processor.fps, frames_indices=list(range(len(frames))))
    else:
        source = _source(video, "video")
        try:
            # transformers would use torchcodec, which needs a system-wide FFmpeg. PyAV includes its own.
            frames, metadata = read_video_pyav(source, video_processor.sample_frames)
        except ImportError as error:
            raise SetupError("reading videos needs PyAV: pip install av.") from error
        except Exception as error:  # so does PyAV
            raise UserError(f"the video {_name(video)} cannot be read: {error}") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2), metadata


def read_bytes(file: dict[str, Any], kind: str) -> bytes:
    """
    The content of a [`media_file`], not decoded.

    Raises:
        UserError: if it does not exist or cannot be read.
    """
    source = _source(file, kind)
    return source.getvalue() if isinstance(source, BytesIO) else Path(source).read_bytes()


def scaled_to_8_bits(values: np.ndarray, limit: int | None = None) -> np.ndarray:
    """
    Scale numbers of more than 8 bits to 0 to 255, rounded.

    Numbers of 16 bits are scaled from 0 to 65,535 (`limit`), whatever their range in the image. 32 bits (integers or
    floats) say nothing about what is white: the first of 1, 255 and 65,535 that no number exceeds; with larger or
    negative numbers, the image's own range. NaN counts as the smallest number, and infinity as the limit.

    Args:
        values (`np.ndarray` `[height, width]`): any integer or float dtype.

    Returns:
        `np.ndarray` `[height, width]`, uint8.

    Raises:
        UserError: if no number is finite.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UserError("none of its pixels is a finite number.")
    low, high = float(finite.min()), float(finite.max())
    if limit is None and low >= 0:
        limit = next((limit for limit in (1, 255, SIXTEEN_BITS) if high <= limit), None)
    if limit is not None:
        low, high = 0.0, float(limit)
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16 or 32 bits; Pillow's own conversion cuts off at 255
        values = np.asarray(image)
        # Pillow reads PGM, and before version 11 PNG, of 16 bits into 32.
        is_16_bit = image.mode.startswith("I;16") or image.format in ("PPM", "PNG")
        picture = Image.fromarray(scaled_to_8_bits(values, SIXTEEN_BITS if is_16_bit else None))
        if (transparent := image.info.get("transparency")) is not None:
            picture.putalpha(Image.fromarray(values != transparent).convert("L"))
        image = picture
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _source(file: dict[str, Any], kind: str) -> str | BytesIO:
    """The path of a regular file, or the content of one that is elsewhere: in the row, in a zip file, or remote."""
    path = file["path"]
    if file["bytes"] is not None:
        return BytesIO(file["bytes"])
    if "://" in path:
        try:
            return DownloadManager(download_config=DownloadConfig(disable_tqdm=True)).download(path)
        except Exception as error:  # of connections, servers, and the offline mode of `datasets`
            raise UserError(f"the {kind} {path[:SHOWN]} cannot be fetched: {str(error)[:SHOWN]}") from error
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise _missing(path, kind) from error
    except NotADirectoryError:
        return _zipped(path, kind)
    except (OSError, ValueError) as error:  # a name that is too long or holds a null byte, no permission
        raise UserError(f"the {kind} {path[:SHOWN]!r} cannot be read: {str(error)[:SHOWN]}") from error
    if not stat.S_ISREG(mode):  # a pipe would be waited for without end
        raise UserError(f"the {kind} {path} is not a file, but a folder, pipe or device.")
    return path


def _zipped(path: str, kind: str) -> BytesIO:
    """The content of /folder/images.zip/image.png: a file in an archive, named as if that were a folder."""
    archive = next((parent for parent in Path(path).parents if parent.is_file()), None)
    if archive is None:  # but a pipe or device
        raise _missing(path, kind)
    try:
        return BytesIO(_archive(str(archive), os.getpid()).read(Path(path).relative_to(archive).as_posix()))
    except KeyError as error:
        raise _missing(path, kind) from error
    except Exception as error:  # decompressors raise exceptions of many types
        raise UserError(f"the {kind} {path} cannot be read from {archive}: {error}") from error


@lru_cache(maxsize=8)
def _archive(path: str, process: int) -> ZipFile:
    """An open archive: of this process, because forked ones would share a position in the file."""
    return ZipFile(path)


def _missing(path: str, kind: str) -> UserError:
    folder = next(parent for parent in Path(path).parents if parent.exists())
    example = f", such as {archives[0]}" if (archives := _archives(folder)) else ""
    return UserError(
        f"the {kind} {path[:SHOWN]} does not exist: check the path and --image_root, the folder or zip file that "
        f"relative paths start from{example}."
    )


@lru_cache(maxsize=8)
def _archives(folder: Path) -> list[str]:
    """The zip files in a folder; looked up once, because there may be 50,000 images beside, and as many rows."""
    return sorted(str(file) for file in folder.glob("*.zip")) if folder.is_dir() else []


def _file_uri(uri: str, kind: str) -> tuple[str, str]:
    """Host and path."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"the {kind} {uri[:SHOWN]} is not a valid file: URI: {error}.") from error
    return parts.netloc, unquote(parts.path)


def _data(uri: str, kind: str) -> bytes:
    header, comma, content = uri.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma before the data")
        data = unquote_to_bytes(content)
        content = base64.b64decode(data, validate=True) if header.lower().endswith(";base64") else data
    except ValueError as error:
        raise UserError(f"the {kind} {uri[:40]}... is not a valid data: URI: {error}.") from error
    if not content:
        raise UserError(f"the {kind} {uri[:40]} is an empty data: URI.")
    return content


def _name(file: dict[str, Any]) -> str:
    return file["path"] or "in the row"
