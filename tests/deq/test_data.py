"""Data sets and batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deq.data import Batches, cifar10, digits, image_folder, sources
from deq.errors import UserError


def folder_of_images(root: Path, size: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """3 training images and 2 test images a class, each of one grey value."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.full((size, size, 3), 100 * label + 10 * number, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


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


@pytest.mark.parametrize("size", [5, 1438, 0.5])
def test_an_impossible_share_is_refused_with_its_limits(size: Any) -> None:
    with pytest.raises(UserError, match=f"train_size must be an integer from 10 to 1437, or null for all, got {size}"):
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
    monkeypatch.setattr(sources, "_read", lambda path, size: (decoded.append(path), read(path, size))[1])
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


def test_cifar10_without_a_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources, "CIFAR10", no_network)
    with pytest.raises(
        UserError, match=f"not in {tmp_path}.*put cifar-10-python.tar.gz .* data=image_folder"
    ) as caught:
        cifar10(str(tmp_path))
    assert "\n" not in str(caught.value)
