"""A folder of images: listed, split, and decoded once to the pixels that serving will see."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handler.codecs import image as codec
from handler.contract import Contract
from training import folders
from training.config import DataSettings
from training.data import DataError, Dataset, load

CLASSES = ("ant", "bee", "cat")
SUFFIXES = ("png", "jpg", "JPEG", "bmp", "webp")


def picture(seed: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, ten images each to train on, two for each other purpose; all formats."""
    for part, count in (("train", 10), ("val", 2), ("test", 2)):
        for k, name in enumerate(CLASSES):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(100 * k + i).save(folder / f"{i}.{SUFFIXES[i % 5]}")
    return tmp_path / "images"


def settings(root: Path, **more: Any) -> DataSettings:
    tree = {"height": 6, "width": 5, "validation": 6, **more}
    return DataSettings(name="folder", path=str(root), root=str(root.parent / "data"), **tree)


def read(root: Path, **more: Any) -> Dataset:
    return load(settings(root, **more))


def without(root: Path, part: str) -> Path:
    (root / part).rename(root.parent / part)
    return root


def test_three_parts_with_the_classes_of_train(root: Path) -> None:
    dataset = read(root)
    assert dataset.labels == CLASSES
    assert dataset.shape == (3, 6, 5)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [30, 6, 6]
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(7, 9), (3, 4), (20, 31)])
def test_the_pixels_are_those_that_the_served_student_is_given(
    root: Path, channels: int, size: tuple[int, int]
) -> None:
    contract = Contract(network="", channels=channels, height=size[0], width=size[1], labels=CLASSES)
    dataset = read(root, channels=channels, height=size[0], width=size[1])
    files = [root / "train" / name / f"{i}.{SUFFIXES[i % 5]}" for name in CLASSES for i in range(10)]
    served = {".png", ".jpg", ".JPEG"}
    assert {path.suffix for path in files} > served
    for path, image in zip(files, dataset.train.images, strict=True):
        if path.suffix in served:
            decoded = codec.raw(codec.decode(path.read_bytes(), contract, folders.PIXELS)[0], contract)
            assert (image.numpy() == decoded).all(), path


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["bmp", "webp"])
def test_bmp_and_webp_are_the_png_of_the_same_pixels(mode: str, kind: str, tmp_path: Path) -> None:
    contract = Contract(network="", channels=3, height=4, width=6, labels=CLASSES)
    picture(3, (6, 4), mode).save(tmp_path / f"x.{kind}", lossless=True, exact=True)  # which BMP is anyway
    with Image.open(tmp_path / f"x.{kind}") as opened:
        opened.save(tmp_path / "x.png")
    found = folders.decode((tmp_path / f"x.{kind}").read_bytes(), contract)
    payload, _ = codec.decode((tmp_path / "x.png").read_bytes(), contract, folders.PIXELS)
    assert (found == codec.raw(payload, contract)).all()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_photograph_lying_on_its_side_is_turned_upright(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise: what lies left comes up
    lying = Image.new("RGB", (16, 8), "black")
    lying.paste("white", (0, 0, 8, 8))
    lying.save(tmp_path / "x", kind, exif=exif)
    contract = Contract(network="", channels=3, height=16, width=8, labels=CLASSES)
    upright = folders.decode((tmp_path / "x").read_bytes(), contract)
    assert upright[:, :8].min() > 200
    assert upright[:, 8:].max() < 50


def test_an_image_is_known_by_its_bytes_whatever_it_is_called(root: Path) -> None:
    """Collected photographs are often WebP files called .jpg."""
    path = root / "train" / "ant" / "1.jpg"
    picture(77, (5, 6)).save(path, "webp", lossless=True)
    assert (read(root).train.images[1].numpy() == np.asarray(picture(77, (5, 6))).transpose(2, 0, 1)).all()


def test_what_is_no_image_is_passed_over(root: Path) -> None:
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "ant" / ".hidden.png").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "list.csv").write_text("x")
    dataset = read(root)
    assert (dataset.labels, len(dataset.train)) == (CLASSES, 30)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder(root: Path, name: str) -> None:
    (root / "val").rename(root / name)
    assert [len(part) for part in (read(root).train, read(root).validation)] == [30, 6]


def test_without_val_images_are_held_out_of_train(root: Path) -> None:
    whole = read(root)
    dataset = read(without(root, "val"))
    assert dataset.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    parts = [{image.numpy().tobytes() for image in part.images} for part in (dataset.train, dataset.validation)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {image.numpy().tobytes() for image in whole.train.images}


def test_more_held_out_than_there_are_says_what_to_set(root: Path) -> None:
    with pytest.raises(DataError, match=r"data.validation=5000: .* only 10 images; set data.validation=27 or less"):
        read(without(root, "val"), validation=5000)
    assert len(read(root, validation=27).validation) == 27


def test_limits_keep_a_mix_of_the_classes(root: Path) -> None:
    dataset = read(root, train_limit=6, test_limit=3)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [0, 1, 2]
    assert len({dataset.digest, read(root, train_limit=6).digest, read(root).digest}) == 3


def test_the_digest_follows_contents_not_times(root: Path) -> None:
    before = read(root).digest
    path = root / "train" / "bee" / "0.png"
    os.utime(path, ns=(1, 1))
    assert read(root).digest == before
    picture(5).save(path)
    assert read(root).digest != before


@pytest.mark.parametrize("change", [{"height": 7}, {"width": 7}, {"channels": 1}])
def test_the_digest_follows_the_size(root: Path, change: dict[str, int]) -> None:
    one, other = read(root), read(root, **change)
    assert one.digest != other.digest
    assert one.shape != other.shape


def test_the_digest_is_the_same_elsewhere(root: Path) -> None:
    before = read(root).digest
    shutil.rmtree(root.parent / "data")
    moved = root.rename(root.parent / "moved")
    assert read(moved).digest == before


def test_the_digest_follows_a_class_s_name(root: Path) -> None:
    before = read(root).digest
    for part in ("train", "val", "test"):
        (root / part / "cat").rename(root / part / "cow")
    assert read(root).digest != before


def test_decoded_once_and_read_from_the_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(root)
    monkeypatch.setattr(folders, "decode", lambda payload, contract: pytest.fail("decoded again"))
    again = read(root)
    assert again.digest == first.digest
    for part in ("train", "validation", "test"):
        assert getattr(again, part).images.equal(getattr(first, part).images)
    maps = Path("/proc/self/maps").read_text()
    assert str(root.parent / "data" / "folders") in maps, "the pixels are mapped, not in memory"


def test_a_killed_run_leaves_nothing_that_is_believed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = folders.decode, []

    def killed(payload: bytes, contract: Contract) -> Any:
        calls.append(1)
        if len(calls) == 33:  # in the second part
            raise KeyboardInterrupt
        return real(payload, contract)

    monkeypatch.setattr(folders, "decode", killed)
    with pytest.raises(KeyboardInterrupt):
        read(root)
    names = {path.name for path in (root.parent / "data").rglob("*") if path.is_file()}
    assert names == {"lock", "train.npy", "train.sha256"}
    calls.clear()
    assert len(read(root).validation) == 6
    assert len(calls) == 12, "train/ is not decoded again"


def test_two_at_once_decode_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of one training do."""
    real, calls = folders.decode, []

    def counted(payload: bytes, contract: Contract) -> Any:
        calls.append(1)
        return real(payload, contract)

    monkeypatch.setattr(folders, "decode", counted)
    contract = Contract(network="", channels=3, height=6, width=5, labels=CLASSES)
    files = [folders.File(f"train/ant/{i}.{SUFFIXES[i % 5]}", 0, 0, 0) for i in range(10)]
    path = root.parent / "cache" / "train.npy"
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda _: folders._decoded(root, files, contract, path), range(4)))
    assert len(set(digests)) == 1
    assert len(calls) == len(files)


def test_a_damaged_cache_is_refused_by_name(root: Path) -> None:
    read(root)
    path = next((root.parent / "data").rglob("train.npy"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"train.npy: damaged .*; remove it and run again"):
        read(root)


def test_a_disk_that_is_too_small_is_an_error_beforehand(root: Path) -> None:
    with pytest.raises(DataError, match=r"GB of decoded images, .* GB are free; set data.root"):
        read(root, height=2_000_000, width=2_000_000)
    assert not list((root.parent / "data").rglob("*.npy*"))


def broken(root: Path) -> None:
    path = root / "test" / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:200])


def text(root: Path) -> None:
    (root / "train" / "cat" / "3.bmp").write_text("no image at all")


def nested(root: Path) -> None:
    (root / "train" / "cat" / "more").mkdir()


def empty_class(root: Path) -> None:
    (root / "train" / "dog").mkdir()


def unknown_class(root: Path) -> None:
    (root / "test" / "dog").mkdir()


def no_test(root: Path) -> None:
    without(root, "test")


def empty_test(root: Path) -> None:
    without(root, "test")
    (root / "test" / "ant").mkdir(parents=True)


def no_train(root: Path) -> None:
    without(root, "train")


def one_class(root: Path) -> None:
    for name in CLASSES[1:]:
        (root / "train" / name).rename(root.parent / name)


def dangling(root: Path) -> None:
    (root / "val" / "ant" / "x.png").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken, r"test/bee/1.jpg: the image cannot be decoded: .*; mend it or remove it"),
        (text, r"train/cat/3.bmp: neither PNG, JPEG, BMP nor WebP; mend it or remove it"),
        (nested, r"train/cat/more: a folder inside a class"),
        (empty_class, r"train/dog: no images"),
        (unknown_class, r"test/dog: train/ has no class of that name; expected ant, bee, cat"),
        (no_test, r"images/test: no such folder; expected a folder for each class"),
        (empty_test, r"images/test: no images; expected"),
        (no_train, r"images/train: no such folder"),
        (one_class, r"images/train: 1 classes; expected two or more"),
        (dangling, r"val/ant/x.png: cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(root: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_a_class_may_lack_test_images(root: Path) -> None:
    (root / "test" / "bee").rename(root.parent / "bee")
    assert read(root).test.labels.tolist() == [0, 0, 2, 2]
