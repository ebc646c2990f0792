"""Data sets and batches."""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from deq.data import Batches, ImageData, cifar10, digits, image_folder, picture, sources
from deq.records.errors import UserError
from tests.test_train import TINY, train


def folder_of_images(root: Path, size: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """3 training images and 2 test images a class, each of one grey value."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.full((size, size, 3), 100 * label + 10 * number, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def read(root: Path, **options: Any) -> ImageData:
    """The folder with a cache beside it; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return image_folder(str(root), str(root.parent / "cache"), **options)


def read_and_told(root: Path) -> tuple[ImageData, list[str]]:
    """The folder, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as told:
        data = image_folder(str(root), str(root.parent / "cache"))
    return data, [str(warning.message) for warning in told]


def refusal(root: Path, **options: Any) -> str:
    """The one sentence with which the folder is refused."""
    with pytest.raises(UserError) as caught:
        image_folder(str(root), str(root.parent / "cache"), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str, *value: int | float, size: tuple[int, int] = (8, 8), palette: list[int] | None = None) -> Any:
    """An image of one value."""
    image = Image.new(mode, size, value if len(value) > 1 else value[0])
    if palette is not None:
        image.putpalette(palette)
    return image


def tiff(
    values: bytes, bits: int, *, kind: int = 1, white: int = 1, channels: int = 1, extra: int | None = None
) -> bytes:
    """A TIFF of one row of two pixels, with what Pillow reads but does not write.

    kind: 1 for unsigned, 2 for signed numbers; white: whether it is the greatest value or 0; extra: 0 where the
    channels beyond a colour are of no stated meaning, 1 where the last one is an alpha that the others are
    multiplied with.
    """
    tags = {256: 2, 257: 1, 259: 1, 262: white, 273: 0, 277: channels, 278: 1, 279: len(values), 339: kind}
    tags |= {} if extra is None else {338: extra}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    after = start + len(values)  # the bits of each channel, where they do not fit into the entry
    entries = [(tag, 3, 1, start if tag == 273 else value) for tag, value in tags.items()]
    entries.append((258, 3, channels, after if channels > 2 else bits * 0x10001))
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + directory + struct.pack("<I", 0) + values + struct.pack(f"<{channels}H", *[bits] * channels)


def png(depth: int, colour: int, row: bytes, key: bytes) -> bytes:
    """A PNG of one row of one pixel, with a value or colour that stands for nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def test_digits_are_split_class_by_class_and_the_same_each_time() -> None:
    data, again = digits(), digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert torch.bincount(data.test.labels).min() >= 34
    assert torch.equal(data.test.images, again.test.images)


def test_a_share_is_class_stratified_fixed_and_of_the_stated_size() -> None:
    data = digits(train_size=500, test_size=100)
    assert (len(data.train), len(data.test)) == (500, 100)
    assert torch.bincount(data.train.labels).min() >= 48
    assert torch.equal(data.train.images, digits(train_size=500).train.images)


@pytest.mark.parametrize("size", [5, 1438, 0.5, True])
def test_an_impossible_share_is_refused_with_its_limits(size: Any) -> None:
    with pytest.raises(UserError, match=f"an integer from 10 to 1437, or null for all, got {str(size).lower()}"):
        digits(train_size=size)


def test_training_batches_are_normalised_with_the_training_sets_statistics() -> None:
    images = torch.cat([images for images, _ in Batches(digits(), 100, seed=0).train(epoch=0)])
    assert len(images) == 1437
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_order_depends_on_seed_and_epoch_alone_and_can_be_entered_in_the_middle() -> None:
    batches = Batches(digits(), 100, seed=3)
    whole = [labels for _, labels in batches.train(epoch=1)]
    torch.rand(7)  # the global generator plays no part
    rest = [labels for _, labels in batches.train(epoch=1, start=4)]
    assert len(whole) == batches.per_epoch == 15
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert not torch.equal(whole[0], next(batches.train(epoch=2))[1])
    assert not torch.equal(whole[0], next(Batches(digits(), 100, seed=4).train(epoch=1))[1])


def test_the_chosen_samples_are_those_of_the_batches() -> None:
    batches = Batches(digits(), 100, seed=3)
    chosen = batches.chosen(epoch=1, start=4)
    for index, (images, labels) in zip(chosen, batches.train(epoch=1, start=4), strict=True):
        assert torch.equal(batches.data.train.labels[index], labels)
        assert torch.equal(batches._normalised(batches.data.train.images[index]), images)
    assert torch.equal(torch.cat(batches.chosen(epoch=1)).sort().values, torch.arange(1437))


def test_each_image_is_augmented_on_its_own() -> None:
    data = digits(augment="crop")
    same = data.train.images[:1].expand(64, -1, -1, -1)
    from deq.data.augment import AUGMENTATIONS, augment

    torch.manual_seed(0)
    moved = augment(same, AUGMENTATIONS["crop"](8))
    assert len({image.numpy().tobytes() for image in moved}) > 4  # nine places, and a batch-wide draw gives one


def test_test_images_are_never_augmented() -> None:
    plain, cropped = (Batches(digits(augment=name), 360, seed=0) for name in ("none", "crop"))
    assert torch.equal(next(plain.test())[0], next(cropped.test())[0])


def test_an_unknown_augmentation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"data.augment must be one of none, crop, crop_flip, got 'flop'"):
        digits(augment="flop")


def test_image_folder_reads_what_lies_there(tmp_path: Path) -> None:
    data = image_folder(str(folder_of_images(tmp_path / "images")), str(tmp_path / "cache"))
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (6, 3, 8, 8)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]
    assert data.test.labels.tolist() == [0, 0, 1, 1]


def test_image_folder_decodes_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = folder_of_images(tmp_path / "images"), str(tmp_path / "cache")
    decoded: list[Path] = []
    read = sources._read
    monkeypatch.setattr(sources, "_read", lambda path, *how: (decoded.append(path), read(path, *how))[1])
    first = image_folder(str(root), cache)
    assert len(decoded) == 10
    assert torch.equal(image_folder(str(root), cache).train.images, first.train.images)
    assert len(decoded) == 10
    changed = root / "train" / "cat" / "0.png"
    Image.fromarray(np.full((8, 8, 3), 250, dtype=np.uint8)).save(changed)
    os.utime(changed, (1, 1))
    assert image_folder(str(root), cache).train.images[0, 0, 0, 0] == 250
    assert len(decoded) == 16  # the six of train/; test/ came from the cache


def test_images_of_other_sizes_are_refused_and_image_size_is_the_fix(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    Image.fromarray(np.zeros((12, 10, 3), dtype=np.uint8)).save(root / "train" / "dog" / "9.png")
    with pytest.raises(UserError, match=r"dog/9.png has 10×12 pixels .* give data.image_size=N"):
        image_folder(str(root), str(tmp_path / "cache"))
    assert image_folder(str(root), str(tmp_path / "cache"), image_size=6).train.images.shape == (7, 3, 6, 6)


def test_a_missing_root_or_part_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give data.root=DIR"):
        image_folder(None, str(tmp_path))
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        image_folder(str(tmp_path / "nowhere"), str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*test; data.root must hold train/ and test/"):
        image_folder(str(tmp_path), str(tmp_path))


def test_classes_that_only_one_part_has_are_named(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / "test" / "dog").rename(root / "test" / "fox")
    with pytest.raises(UserError, match=r"only one has dog, fox"):
        image_folder(str(root), str(tmp_path / "cache"))


# Pixels: each mode with its own black and white.

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

SIXTEEN_BIT: dict[str, Callable[[int], bytes]] = {
    "png": lambda grey: encoded(Image.fromarray(np.full((8, 8), grey * 257, np.uint16)), "PNG"),
    "tif": lambda grey: encoded(Image.fromarray(np.full((8, 8), grey * 257, np.uint16)), "TIFF"),
    "tiff": lambda grey: encoded(plain("I;16B", grey * 257), "TIFF"),  # the most significant byte first
    "ppm": lambda grey: encoded(plain("I;16", grey * 257), "PPM"),
    "pgm": lambda grey: b"P5 1 1 1020\n" + struct.pack(">H", grey * 4),  # white is what the file says
}


@pytest.mark.parametrize("kind", SIXTEEN_BIT)
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path, kind: str) -> None:
    for part in ("train", "test"):
        for name, grey in (("cat", 39), ("dog", 117)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.{kind}").write_bytes(SIXTEEN_BIT[kind](grey))
    split = read(tmp_path / "images").train
    means = [split.images[split.labels == label].float().mean().item() for label in (0, 1)]
    assert means == [39, 117]


def test_sixteen_bit_black_and_white_are_black_and_white_and_the_rest_is_rounded(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 32767, 65406, 65535]], np.uint16)
    (tmp_path / "grey.png").write_bytes(encoded(Image.fromarray(values), "PNG"))
    assert picture.read(tmp_path / "grey.png", None)[0, :, 0].tolist() == [0, 0, 1, 127, 254, 255]


EIGHT_BIT = {
    "1": (encoded(plain("1", 1), "PNG"), (255, 255, 255)),
    "L": (encoded(plain("L", 77), "PNG"), (77, 77, 77)),
    "L of 4 bits": (tiff(b"\x55", 4), (85, 85, 85)),
    "La, opaque": (tiff(b"\x4d\xff" * 2, 8, channels=2, extra=1), (77, 77, 77)),
    "LA, opaque": (encoded(plain("LA", 77, 255), "PNG"), (77, 77, 77)),
    "P": (encoded(plain("P", 1, palette=[0, 0, 0, 200, 100, 50]), "PNG"), (200, 100, 50)),
    "P with a transparent colour that no pixel has": (
        encoded(plain("P", 1, palette=[0, 0, 0, 200, 100, 50]), "PNG", transparency=0),
        (200, 100, 50),
    ),
    "PA, opaque": (encoded(plain("PA", 1, 255, palette=[0, 0, 0, 200, 100, 50]), "TIFF"), (200, 100, 50)),
    "RGB": (encoded(plain("RGB", 200, 100, 50), "PNG"), (200, 100, 50)),
    "RGB of 16 bits": (tiff(struct.pack("<6H", *[200 * 257, 100 * 257, 50 * 257] * 2), 16, white=2, channels=3),
                       (200, 100, 50)),
    "RGBA, opaque": (encoded(plain("RGBA", 200, 100, 50, 255), "PNG"), (200, 100, 50)),
    "CMYK": (encoded(plain("CMYK", 0, 0, 0, 178), "JPEG"), (77, 77, 77)),
    "YCbCr": (encoded(plain("YCbCr", 77, 128, 128), "TIFF"), (77, 77, 77)),
    "LAB": (encoded(plain("LAB", 128, 128, 128), "TIFF"), (119, 119, 119)),
    "I;16 of 12 bits": (tiff(b"\x7f\xf7\xff", 12), (127, 127, 127)),
}  # fmt: skip


@pytest.mark.parametrize("mode", EIGHT_BIT)
def test_every_mode_is_read_with_its_own_black_and_white(tmp_path: Path, mode: str) -> None:
    content, colour = EIGHT_BIT[mode]
    (tmp_path / "image").write_bytes(content)
    with Image.open(tmp_path / "image") as opened:
        assert opened.mode == mode.split()[0].rstrip(",")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = picture.read(tmp_path / "image", None)
    assert pixels.dtype == np.uint8
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(colour)]


def test_no_mode_of_pillow_is_left_to_its_conversion(tmp_path: Path) -> None:
    """A mode that no file kind here holds, and one that Pillow may learn some day."""
    assert picture._rgb(plain("HSV", 0, 0, 77), tmp_path).getpixel((0, 0)) == (77, 77, 77)
    image = plain("L", 77)
    image._mode = "L;9"
    with pytest.raises(UserError, match=r"has Pillow's mode L;9, which is not read; save it as 8-bit RGB"):
        picture._rgb(image, tmp_path)


RANGE_UNKNOWN = "and no file tells which of them are black and white; save it with 8 or 16 unsigned bits a channel"
TRANSPARENT = "is transparent in places, and no file tells what is behind it; put it on a background of one colour and"
BLACK_AND_RED = [0, 0, 0, 255, 0, 0]
GUESSES = {
    "float": (encoded(plain("F", 99.5), "TIFF"), f"holds floating-point numbers, {RANGE_UNKNOWN}"),
    "float up to 1": (encoded(plain("F", 0.5), "TIFF"), f"holds floating-point numbers, {RANGE_UNKNOWN}"),
    "not a number": (encoded(plain("F", float("nan")), "TIFF"), f"holds floating-point numbers, {RANGE_UNKNOWN}"),
    "float in a PFM": (b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), f"holds floating-point numbers, {RANGE_UNKNOWN}"),
    "32 bits": (tiff(struct.pack("<2I", 9, 9), 32), f"holds 32-bit integers, {RANGE_UNKNOWN}"),
    "signed 32 bits": (encoded(plain("I", 70_000), "TIFF"), f"holds signed integers, {RANGE_UNKNOWN}"),
    "signed 16 bits": (tiff(struct.pack("<2h", -9, 9), 16, kind=2), f"holds signed integers, {RANGE_UNKNOWN}"),
    "signed 8 bits": (tiff(struct.pack("<2b", -9, 9), 8, kind=2), f"holds signed integers, {RANGE_UNKNOWN}"),
    "16 bits, white first": (tiff(bytes(4), 16, white=0), "holds 16-bit values of which 0 is white; save it with 0 as"),
    "a fourth channel": (
        tiff(bytes(8), 8, white=2, channels=4, extra=0),
        "holds 4 channels, of which 3 would be read; save it as 8-bit RGB",
    ),
    "a second channel": (
        tiff(bytes(4), 8, channels=2, extra=0),
        "holds 2 channels, of which 1 would be read; save it as 8-bit RGB",
    ),
    **{
        f"frames in a {kind}": (
            encoded(PHOTO.rotate(180), kind, save_all=True, append_images=[PHOTO, PHOTO.rotate(90)]),
            "holds 3 frames and must hold 1; save each that is meant as a file of its own",
        )
        for kind in ("PNG", "TIFF", "WEBP", "GIF")
    },
    "RGBA": (encoded(plain("RGBA", 9, 9, 9, 254), "PNG"), TRANSPARENT),
    "LA": (encoded(plain("LA", 9, 0), "PNG"), TRANSPARENT),
    "La": (tiff(b"\x05\x80" * 2, 8, channels=2, extra=1), TRANSPARENT),
    "PA": (encoded(plain("PA", 1, 0, palette=BLACK_AND_RED), "TIFF"), TRANSPARENT),
    "P with one colour": (encoded(plain("P", 1, palette=BLACK_AND_RED), "PNG", transparency=1), TRANSPARENT),
    "P with alphas": (encoded(plain("P", 1, palette=BLACK_AND_RED), "PNG", transparency=b"\xff\x80"), TRANSPARENT),
    "L with a key": (encoded(plain("L", 9), "PNG", transparency=9), TRANSPARENT),
    "RGB with a key": (encoded(plain("RGB", 1, 2, 3), "PNG", transparency=(1, 2, 3)), TRANSPARENT),
    "16 bits with a key": (png(16, 0, b"\x12\x34", b"\x12\x34"), TRANSPARENT),
    "16-bit RGB with a key": (png(16, 2, b"\x12\x34" * 3, b"\x12\x34" * 3), TRANSPARENT),
    "WebP": (encoded(plain("RGBA", 9, 9, 9, 0), "WEBP", lossless=True), TRANSPARENT),
}  # fmt: skip


@pytest.mark.parametrize("guess", GUESSES)
def test_pixels_that_would_be_a_guess_are_refused_by_name(tmp_path: Path, guess: str) -> None:
    content, sentence = GUESSES[guess]
    root = folder_of_images(tmp_path / "images")
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(content)
    assert refusal(root).startswith(f"{file} {sentence}")


def test_a_key_that_no_sixteen_bit_pixel_has_is_no_transparency(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(png(16, 0, struct.pack(">H", 39 * 257), struct.pack(">H", 39 * 257 + 1)))
    assert picture.read(tmp_path / "image", None).tolist() == [[[39, 39, 39]]]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_key_of_few_bits_counts_where_a_pixel_has_it(tmp_path: Path, depth: int) -> None:
    for value, key in itertools.product((0, 1), repeat=2):
        (tmp_path / "image").write_bytes(png(depth, 0, bytes([value << 8 - depth]), struct.pack(">H", key)))
        if value == key:
            with pytest.raises(UserError, match=TRANSPARENT):
                picture.read(tmp_path / "image", None)
        else:
            assert picture.read(tmp_path / "image", None)[0, 0, 0] == value * 255 // (2**depth - 1)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_that_hold_only_twelve_are_told_once_a_folder(tmp_path: Path, kind: str) -> None:
    root = folder_of_images(tmp_path / "images")
    for file in (root / "train").glob("*/*.png"):
        Image.fromarray(np.full((8, 8), 4000 + int(file.stem), np.uint16)).save(file.with_suffix(f".{kind}"))
        if kind != "png":
            file.unlink()
    assert read_and_told(root)[1] == [
        f"no 16-bit image of {root / 'train'} has a value above 4002 of 65535, so they are read as nearly black; where "
        "they hold fewer bits, such as 12, multiply their values up to 65535"
    ]
    Image.fromarray(np.full((8, 8), 4096, np.uint16)).save(root / "train" / "cat" / f"3.{kind}")
    assert read_and_told(root)[1] == []


def test_a_note_on_the_camera_that_is_broken_hides_no_pixels(tmp_path: Path) -> None:
    image = png(8, 0, b"\x07", b"")
    broken = struct.pack(">I", 4) + b"eXIfnope" + struct.pack(">I", zlib.crc32(b"eXIfnope"))
    (tmp_path / "image").write_bytes(image.replace(struct.pack(">I", 0) + b"tRNS" + image[41:45], broken))
    assert b"eXIf" in (tmp_path / "image").read_bytes()
    assert picture.read(tmp_path / "image", None).tolist() == [[[7, 7, 7]]]


def test_a_size_that_no_memory_holds_is_refused_before_it_is_tried(tmp_path: Path) -> None:
    told = refusal(folder_of_images(tmp_path / "images"), image_size=1_000_000)
    assert told.startswith(f"data.image_size=1000000 needs 36,000 GB for the 6 images of {tmp_path}/images/train, and")
    assert told.endswith("GB of memory; give a smaller one")


def test_a_cameras_jpeg_with_previews_behind_it_is_its_picture(tmp_path: Path) -> None:
    photo = encoded(plain("RGB", 90, 90, 90), "MPO", save_all=True, append_images=[plain("RGB", 9, 9, 9)])
    (tmp_path / "photo.jpg").write_bytes(photo)
    assert np.unique(picture.read(tmp_path / "photo.jpg", None)).tolist() == [90]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_taken_with_the_camera_on_its_side_is_upright(tmp_path: Path, kind: str) -> None:
    stored = np.zeros((16, 16, 3), np.uint8)
    stored[:, :8] = 255  # the left half is white …
    exif = Image.Exif()
    exif[0x112] = 6  # … and is the upper one when turned to the right
    lossless = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "photo").write_bytes(encoded(Image.fromarray(stored), kind, exif=exif, **lossless))
    pixels = picture.read(tmp_path / "photo", None)[:, :, 0]
    assert pixels[:8].min() > 250
    assert pixels[8:].max() < 5


BROKEN = {
    "nothing": (b"", r"it has 0 bytes"),
    "a page of text": (b"version https://git-lfs.github.com/spec/v1\n", "its content is of no kind that Pillow knows"),
    **{
        f"half a {kind}": ((whole := encoded(PHOTO, kind))[: len(whole) // 2], "")
        for kind in ("PNG", "JPEG", "BMP", "TIFF", "PPM", "WEBP")
    },
    "a JPEG without its last byte": (encoded(PHOTO, "JPEG")[:-1], "image file is truncated"),
    "the first bytes of a PNG": (encoded(PHOTO, "PNG")[:20], ""),
    "a PNG with a byte changed": (
        (whole := encoded(PHOTO, "PNG"))[:6000] + bytes([whole[6000] ^ 255]) + whole[6001:],
        "",
    ),
    "a PNG with a header of another image": (encoded(PHOTO, "PNG").replace(b"IHDR", b"IHDX", 1), ""),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    content, reason = BROKEN[fault]
    root = folder_of_images(tmp_path / "images")
    file = root / "test" / "cat" / "1.png"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of what else is amiss
        sentence = refusal(root)
    assert sentence.startswith(f"{file} is not a readable image ({reason}")
    assert sentence.endswith("); mend it or take it away")


def test_an_image_too_large_to_be_true_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert "train/cat/0.png is not a readable image (Image size (64 pixels) exceeds limit of" in refusal(root)


def test_how_many_more_images_cannot_be_used_is_told_with_the_first(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    for name in ("cat/1.png", "dog/0.png", "dog/2.png"):
        (root / "train" / name).write_bytes(b"")
    assert refusal(root) == (
        f"{root}/train/cat/1.png is not a readable image (it has 0 bytes); mend it or take it away "
        f"(and 2 more files of {root}/train cannot be used)"
    )


# Folders: what is a class, and what is left out.

ONLY = "only .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff or .webp files in"


def test_a_folder_of_images_alone_is_read_without_a_word(tmp_path: Path) -> None:
    assert len(read(folder_of_images(tmp_path / "images")).train) == 6


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"])
def test_a_hidden_folder_is_no_class_and_its_images_are_not_read(tmp_path: Path, name: str) -> None:
    root = folder_of_images(tmp_path / "images", classes=("cat", "dog", name))
    within = root / "train" / "cat" / name
    (root / "train" / name).rename(within)
    data, told = read_and_told(root)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (6, 4)
    assert [sentence.split(";")[0] for sentence in told] == [
        f"data.root={root}: left out of {part}/ are hidden folders (1)" for part in ("train", "test")
    ]


@pytest.mark.parametrize("name", ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".0.png.swp"])
def test_a_hidden_file_is_no_image(tmp_path: Path, name: str) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / "train" / "cat" / name).write_bytes(b"\0\5\x16\7")
    (root / "train" / name).write_bytes(b"\0\5\x16\7")
    data, told = read_and_told(root)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]
    assert told == [
        f"data.root={root}: left out of train/ are hidden files (2); {ONLY} train/<class>/ are read, so convert or "
        f"move there what should be used"
    ]


def test_what_is_left_out_is_counted_and_told_each_time(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    for name in ("cat/a.gif", "cat/b.GIF", "dog/c.gif", "dog/labels.csv", "dog/README", "stray.png", "cat/more/d.npy"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(b"?")
    first, told = read_and_told(root)
    assert told == [
        f"data.root={root}: left out of train/ are .gif files (3), .csv files (1), .npy files (1), files outside the "
        f"class folders (1), files without an ending (1); {ONLY} train/<class>/ are read, so convert or move there "
        f"what should be used"
    ]
    assert len(first.train) == 6
    again, told_again = read_and_told(root)  # from the cache
    assert told_again == told
    assert torch.equal(again.train.images, first.train.images)


def test_of_many_kinds_the_most_frequent_are_told_and_the_others_counted(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    for number in range(30):
        (root / "test" / "cat" / f"volume.{number:03}").touch()
    for number in range(3):
        (root / "test" / "dog" / f"{number}.gif").touch()
    _, (sentence,) = read_and_told(root)
    assert sentence.startswith(f"data.root={root}: left out of test/ are .gif files (3), .000 files (1), ")
    assert "others (23); only" in sentence


def test_images_lie_in_the_order_of_torchvisions_image_folder(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images", classes=("a-b", "a", "B"))
    for number, name in enumerate(("a/sub/9.png", "a/sub-a/9.png", "a/sub/deep/1.PNG", "B/10.png")):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(encoded(plain("RGB", 200 + number, 0, 0), "PNG"))
    theirs = ImageFolder(str(root / "train"))
    ours = read(root)
    assert ours.classes == tuple(theirs.classes)
    assert ours.train.labels.tolist() == theirs.targets
    assert ours.train.images[:, 0, 0, 0].tolist() == [theirs[index][0].getpixel((0, 0))[0] for index in range(13)]


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog/within"])
def test_a_link_in_a_circle_does_not_multiply_the_images(tmp_path: Path, target: str) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / "train" / "dog" / "within").symlink_to(root / "train" / "cat")  # and so it is for a link back to this one
    for file in (root / "train" / "cat").iterdir():
        (root / "train" / "dog" / f"linked {file.name}").symlink_to(file)
    (root / "train" / "cat" / "back").symlink_to(target, target_is_directory=True)
    data, (sentence,) = read_and_told(root)
    # cat: its 3; dog: its 3, 3 links to files, and the 3 in the folder linked to.
    assert torch.bincount(data.train.labels).tolist() == [3, 9]
    assert sentence.split(";")[0] == f"data.root={root}: left out of train/ are links to a folder around them (2)"


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / "train" / "dog").rename(tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert read(root).train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]


@pytest.mark.parametrize("place", ["train/cat/9.png", "train/fox"])
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path: Path, place: str) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / place).symlink_to(tmp_path / "a disk that is not there")
    assert refusal(root) == f"{root / place} cannot be read (a link that leads nowhere); mend it or take it away"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_left_out_and_not_waited_for(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    os.mkfifo(root / "train" / "cat" / "9.png")
    data, (sentence,) = read_and_told(root)
    assert len(data.train) == 6
    assert "left out of train/ are pipes and devices (1); " in sentence


def test_a_folder_without_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")
    scandir = os.scandir

    def locked(path: Any) -> Any:  # as root, who may run the tests, everything can be read
        if Path(path).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    sentence = refusal(root)
    assert sentence == f"{root}/train/dog cannot be read (Permission denied); mend it or take it away"


def test_a_file_without_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")

    def locked(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", locked)
    assert "train/cat/0.png is not a readable image (Permission denied); mend it or take it away" in refusal(root)


def test_a_class_without_an_image_is_named_with_what_is_read(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    for part in ("train", "test"):
        (root / part / "fox").mkdir()
        (root / part / "fox" / "0.gif").touch()
    assert refusal(root) == (
        f"data.root={root}: train/ holds no .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff or .webp file in fox; put "
        f"images there, or take the class away from train/ and test/"
    )


def test_a_part_without_a_class_is_named(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images", classes=(".hidden",))
    assert refusal(root).startswith(f"data.root={root}: train/ holds no class folder; data.root must hold train/ and")


def test_a_name_that_is_no_text_is_read_like_any_other(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    try:
        (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / os.fsdecode(b"\xff\xfe.png"))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert sorted(read(root).train.images[:3, 0, 0, 0].tolist()) == [0, 10, 20]


def test_a_root_that_reads_as_a_number_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_images(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert len(image_folder(2024, "cache").train) == 6  # type: ignore[arg-type]  # as Hydra passes data.root=2024


def test_folders_that_are_not_given_or_not_there_are_named(tmp_path: Path) -> None:
    root = str(folder_of_images(tmp_path / "images"))
    with pytest.raises(UserError, match=r"^data.cache_dir is not set; give data.cache_dir=DIR, where decoded images"):
        image_folder(root, None)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^data.root=~no_such_user/x: there is no such home folder; give data.root=DIR"
    ):
        image_folder("~no_such_user/x", root)
    with pytest.raises(UserError, match=r"^data.root is not set; give data.root=DIR, where CIFAR-10 is or shall be"):
        cifar10(None)  # type: ignore[arg-type]


# The cache: of these very files and whole, or made again.


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Intruder(file.parent / "intruded")))


def with_an_intruder(file: Path) -> None:
    key = np.load(file)["key"]
    np.savez(file, key=key, images=np.array([Intruder(file.parent / "intruded")] * 6, dtype=object))


def rewritten(file: Path, **changes: Any) -> None:
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    arrays |= changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


BREAKS: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda file: file.write_bytes(b""),
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "without its last byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a byte changed": lambda file: file.write_bytes(
        file.read_bytes().replace(b"n" * 64, b"n" * 63 + b"?", 1)
    ),  # n: 110
    "text": lambda file: file.write_text("images"),
    "a pickle": pickled,
    "pickled arrays": with_an_intruder,
    "torch's format, as earlier versions wrote": lambda file: torch.save({"images": torch.zeros(6, 3, 8, 8)}, file),
    "one bare array": lambda file: np.save(file.open("wb"), np.zeros((6, 3, 8, 8), np.uint8)),
    "no images": lambda file: rewritten(file, images=None),
    "images of other files": lambda file: rewritten(file, key=np.array("0" * 64)),
    "too few images": lambda file: rewritten(file, images=np.zeros((5, 3, 8, 8), np.uint8)),
    "one channel": lambda file: rewritten(file, images=np.zeros((6, 1, 8, 8), np.uint8)),
    "not square": lambda file: rewritten(file, images=np.zeros((6, 3, 8, 9), np.uint8)),
    "flat": lambda file: rewritten(file, images=np.zeros(6 * 3 * 64, np.uint8)),
    "numbers of another kind": lambda file: rewritten(file, images=np.zeros((6, 3, 8, 8), np.float32)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_cache_is_made_again_and_runs_nothing(tmp_path: Path, name: str) -> None:
    root = folder_of_images(tmp_path / "images")
    first = read(root)
    (file,) = (tmp_path / "cache").glob("images-train-*.npz")
    whole = file.read_bytes()
    BREAKS[name](file)
    assert file.read_bytes() != whole
    again, told = read_and_told(root)
    assert told == [f"the cache file {file} is broken or not of these images, and is made again"]
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(read(root).train.images, first.train.images)  # without a word, from the new file
    assert not (tmp_path / "cache" / "intruded").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_change_that_hides_its_size_and_time_is_seen(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    file = root / "train" / "cat" / "0.png"
    file.write_bytes(encoded(plain("RGB", 5, 5, 5), "BMP"))
    before = file.stat()
    assert read(root).train.images[0, 0, 0, 0] == 5
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock may tick only every few milliseconds
        file.write_bytes(encoded(plain("RGB", 7, 7, 7), "BMP"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read(root).train.images[0, 0, 0, 0] == 7


def test_images_decoded_by_another_pillow_are_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")
    read(root)
    monkeypatch.setattr(sources.PIL, "__version__", "0")
    read(root)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_cache_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of_images(tmp_path / "images")
    (tmp_path / "file").touch()
    monkeypatch.setattr(sources, "_read", lambda *_: pytest.fail("decoded in vain"))
    for cache, reason in (("file", "File exists"), ("file/cache", "Not a directory")):
        with pytest.raises(UserError) as caught:
            image_folder(str(root), str(tmp_path / cache))
        assert str(caught.value) == (
            f"data.cache_dir={tmp_path / cache} cannot be written ({reason}); make room there or give another "
            f"data.cache_dir=DIR"
        )


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")

    def full(file: Path, **_: Any) -> None:
        assert file.parent.parent == tmp_path / "cache"  # a rename is atomic only within one file system
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert "cannot be written (No space left on device); make room there or give another data.cache_dir" in refusal(
        root
    )
    assert not list((tmp_path / "cache").iterdir())


def test_an_interrupted_run_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")

    def interrupted(file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(root)
    assert not list((tmp_path / "cache").iterdir())
    assert len(read(root).train) == 6


def test_two_processes_that_write_at_once_both_have_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_images(tmp_path / "images")
    savez, others = np.savez, []

    def slowly(file: Path, **arrays: Any) -> None:
        file.write_bytes(b"half of what is written here")
        if not others:  # the other one comes in the middle, finds no cache, writes it, and reads it
            others.append(None)
            others[:] = [read(root), read(root)]
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", slowly)
    own = read(root)
    for other in [*others, read(root)]:
        assert torch.equal(other.train.images, own.train.images)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# As a user meets it.


def test_the_command_line_tells_in_one_sentence_what_is_refused_and_what_is_left_out(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images")
    (root / "train" / "cat" / "a.gif").touch()
    knobs = ["data=image_folder", "data.root=images", "data.cache_dir=cache", "model=small", "max_steps=1"]
    tiny = [*TINY, "data.train_size=null", "data.test_size=null"]
    run = train(*tiny, *knobs, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    told = (
        f"warning: data.root=images: left out of train/ are .gif files (1); {ONLY} train/<class>/ are read, so convert "
        f"or move there what should be used"
    )
    assert told in run.stderr.splitlines()
    (root / "test" / "dog" / "0.png").write_bytes(encoded(plain("F", 0.5), "TIFF"))
    run = train(*tiny, *knobs, folder=tmp_path)
    assert run.returncode == 2
    assert run.stderr == f"error: images/test/dog/0.png holds floating-point numbers, {RANGE_UNKNOWN}\n"


def test_cifar10_without_a_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources, "CIFAR10", no_network)
    with pytest.raises(
        UserError, match=f"not in {tmp_path}.*put cifar-10-python.tar.gz .* data=image_folder"
    ) as caught:
        cifar10(str(tmp_path))
    assert "\n" not in str(caught.value)
