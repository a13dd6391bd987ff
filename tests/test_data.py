"""Data from its spec: the formats that are read, the splits, augmentation, and how damaged data is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune2deploy.data import Batches, Data, TensorSplit, augment, load_data, normalise
from prune2deploy.errors import InputError

Writer = Callable[[Path, np.ndarray, np.ndarray], None]
"""Writes uint8 pixels [N, 3072] and labels [N] to a file."""


def write_binary10(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    path.write_bytes(np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes())


def write_binary100(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    coarse = (labels // 5).astype(np.uint8)[:, None]
    path.write_bytes(np.concatenate([coarse, labels[:, None].astype(np.uint8), pixels], axis=1).tobytes())


def pickle_writer(key: bytes, protocol: int) -> Writer:
    def write(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
        batch = {
            b"batch_label": b"a batch",
            key: labels.tolist(),
            b"data": pixels,
            b"filenames": [b"a.png"] * len(labels),
        }
        path.write_bytes(pickle.dumps(batch, protocol=protocol))

    return write


CIFAR10_FILES = [f"data_batch_{index}" for index in range(1, 6)], "test_batch"
FORMATS: dict[str, tuple[str, str, list[str], str, Writer]] = {
    "cifar10 binary": (
        "cifar10",
        "cifar-10-batches-bin",
        [f"{file}.bin" for file in CIFAR10_FILES[0]],
        "test_batch.bin",
        write_binary10,
    ),
    "cifar10 protocol 2": ("cifar10", "cifar-10-batches-py", *CIFAR10_FILES, pickle_writer(b"labels", 2)),
    "cifar10 protocol 5": ("cifar10", "cifar-10-batches-py", *CIFAR10_FILES, pickle_writer(b"labels", 5)),
    "cifar100 binary": ("cifar100", "cifar-100-binary", ["train.bin"], "test.bin", write_binary100),
    "cifar100 protocol 2": ("cifar100", "cifar-100-python", ["train"], "test", pickle_writer(b"fine_labels", 2)),
}


def images_of(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, classes, count)


def write_format(name: str, folder: Path, count: int = 20) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Write a small data set; return its kind, and the training pixels, training labels and test labels."""
    kind, _, train_files, test_file, write = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    classes = int(kind.removeprefix("cifar"))
    parts = [images_of(index, count, classes) for index in range(len(train_files))]
    for file, part in zip(train_files, parts, strict=True):
        write(folder / file, *part)
    test = images_of(99, count, classes)
    write(folder / test_file, *test)
    return kind, np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), test[1]


def refused(spec: str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_data(spec, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and held-out images with their labels."""
    splits = (data.train, data.holdout)
    pixels = torch.cat([split.images(torch.arange(len(split))) for split in splits])
    return pixels, torch.cat([split.labels for split in splits])


def require_consistent(data: Data) -> None:
    for split in (data.train, data.holdout, data.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.shape == (len(split),)
        assert int(split.labels.min()) >= 0
        assert int(split.labels.max()) < data.num_classes
        images = split.images(torch.tensor([len(split) - 1, 0]))
        assert images.dtype == torch.uint8
        assert images.shape == (2, *data.input_shape)
        assert torch.equal(images[1:], split.images(torch.tensor([0])))
    assert len(data.class_names) == data.num_classes
    assert len(data.mean) == len(data.std) == data.in_channels


def test_digits_are_split_once_and_for_all() -> None:
    data, other = load_data("digits"), load_data("digits", seed=1)
    require_consistent(data)
    assert (len(data.train), len(data.holdout), len(data.test)) == (1080, 120, 597)
    assert data.input_shape == (1, 8, 8)
    assert not data.flip
    assert torch.equal(data.test.images(torch.arange(597)), other.test.images(torch.arange(597)))
    assert not torch.equal(data.holdout.labels, other.holdout.labels)
    assert int(data.train.images(torch.arange(1080)).max()) == 255


def test_the_digits_normalise_to_mean_0_and_deviation_1() -> None:
    data = load_data("digits")
    pixels = torch.cat([split.images(torch.arange(len(split))) for split in (data.train, data.holdout)])
    scaled = normalise(pixels, data.mean, data.std)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-3)
    assert scaled.std().item() == pytest.approx(1, abs=1e-3)


def test_the_held_out_split_is_a_seeded_share_of_the_training_set_and_shares_no_image_with_it() -> None:
    data = load_data("digits", holdout=0.25, seed=3)
    again = load_data("digits", holdout=0.25, seed=3)
    assert (len(data.train), len(data.holdout)) == (900, 300)
    assert torch.equal(data.holdout.chosen, again.holdout.chosen)  # type: ignore[attr-defined]
    both = torch.cat([data.train.chosen, data.holdout.chosen])  # type: ignore[attr-defined]
    assert torch.equal(both.sort().values, torch.arange(1200))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1e-9, float("nan")])
def test_a_held_out_share_that_empties_a_split_is_refused(share: float) -> None:
    assert "held-out share" in refused("digits", holdout=share)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("nested", [True, False])
def test_the_official_formats_give_every_pixel_and_label(name: str, nested: bool, tmp_path: Path) -> None:
    folder = tmp_path / FORMATS[name][1] if nested else tmp_path
    kind, pixels, labels, test_labels = write_format(name, folder)
    data = load_data(f"{kind}:{tmp_path}")
    require_consistent(data)
    assert data.test.labels.tolist() == test_labels.tolist()
    read, read_labels = everything(data)
    order = torch.cat([data.train.chosen, data.holdout.chosen]).argsort()  # type: ignore[attr-defined]
    assert read[order].flatten(1).numpy().tobytes() == pixels.tobytes()
    assert read_labels[order].tolist() == labels.tolist()
    assert len(data.holdout) == round(0.1 * len(labels))


def test_class_names_are_read_where_they_lie_beside_the_images(tmp_path: Path) -> None:
    names = [f"class{index}" for index in range(10)]
    for folder in ("bin", "py", "none", "short"):
        write_format("cifar10 binary" if folder != "py" else "cifar10 protocol 2", tmp_path / folder)
    (tmp_path / "bin" / "batches.meta.txt").write_text("\n".join([*names, "", ""]))
    (tmp_path / "short" / "batches.meta.txt").write_text("cat\ndog\n")
    meta = {b"label_names": [name.encode() for name in names], b"num_cases_per_batch": 20}
    (tmp_path / "py" / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    assert load_data(f"cifar10:{tmp_path / 'bin'}").class_names == tuple(names)
    assert load_data(f"cifar10:{tmp_path / 'py'}").class_names == tuple(names)
    assert load_data(f"cifar10:{tmp_path / 'none'}").class_names == tuple("0123456789")
    assert load_data(f"cifar10:{tmp_path / 'short'}").class_names == tuple("0123456789")


@pytest.mark.slow
def test_the_sheets_of_cifar10_hold_its_images_in_their_order(data_dir: Path) -> None:
    data = load_data(f"cifar10:{data_dir / 'cifar10'}")
    require_consistent(data)
    assert (len(data.train), len(data.holdout), len(data.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert torch.bincount(torch.cat([data.train.labels, data.holdout.labels])).tolist() == [5000] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    with Image.open(data_dir / "cifar10" / "test.webp") as sheet:
        tile = np.asarray(sheet.convert("RGB"))[5 * 32 : 6 * 32, 7 * 32 : 8 * 32]
    assert torch.equal(data.test.images(torch.tensor([507]))[0], torch.from_numpy(tile.transpose(2, 0, 1).copy()))
    scaled = normalise(data.train.images(torch.arange(45_000)), data.mean, data.std)
    assert scaled.mean((0, 2, 3)).abs().max().item() < 0.01
    assert (scaled.std((0, 2, 3)) - 1).abs().max().item() < 0.01


def test_a_damaged_sheet_is_refused(data_dir: Path, tmp_path: Path) -> None:
    labels = (data_dir / "cifar10" / "labels.npz").read_bytes()
    (tmp_path / "labels.npz").write_bytes(labels)
    for file in ("train_2", "train_3", "train_4", "train_5", "test"):
        (tmp_path / f"{file}.webp").write_bytes(b"")
    assert "train_1.webp is missing" in refused(f"cifar10:{tmp_path}")
    whole = (data_dir / "cifar10" / "train_1.webp").read_bytes()
    (tmp_path / "train_1.webp").write_bytes(whole[: len(whole) // 2])
    assert "train_1.webp' is not a whole WebP image" in refused(f"cifar10:{tmp_path}")
    Image.new("RGB", (64, 32)).save(tmp_path / "train_1.webp", lossless=True)
    assert "has 64x32 pixels, but a sheet has 3200x3200" in refused(f"cifar10:{tmp_path}")
    Image.new("RGB", (3200, 3200)).save(tmp_path / "train_1.webp", lossless=True)
    (tmp_path / "labels.npz").write_bytes(labels[:2000])
    assert "labels.npz' does not hold train, test, class_names" in refused(f"cifar10:{tmp_path}")


def test_a_folder_that_holds_something_else_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    message = refused(f"cifar10:{tmp_path}")
    assert "data_batch_1.bin" in message
    assert "data_batch_1," in message
    assert "train_1.webp" in message
    assert "train.bin, test.bin; or train, test" in refused(f"cifar100:{tmp_path}")
    assert "is not a folder" in refused(f"cifar10:{tmp_path / 'missing'}")
    assert "is not a folder" in refused(f"imagefolder:{tmp_path / 'missing'}")


def test_a_data_set_in_part_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    write_format("cifar10 binary", tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    assert "in part: data_batch_4.bin is missing" in refused(f"cifar10:{tmp_path}")


def test_a_whole_format_wins_over_another_in_part(tmp_path: Path) -> None:
    write_format("cifar10 protocol 2", tmp_path)
    write_binary10(tmp_path / "data_batch_1.bin", *images_of(0, 2, 10))
    assert len(load_data(f"cifar10:{tmp_path}").test) == 20


def test_damaged_binary_files_are_refused(tmp_path: Path) -> None:
    write_format("cifar10 binary", tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "data_batch_3.bin' has 61459 bytes, not a multiple of 3073" in refused(f"cifar10:{tmp_path}")
    path.write_bytes(b"")
    assert "holds 0 images" in refused(f"cifar10:{tmp_path}")
    path.write_bytes(b"\x0b" + whole[1:])
    assert "holds a label outside 0..9, so it is not cifar10" in refused(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, "b'labels' is missing in it"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "uint8 data [N, 3072]"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "uint8 data [N, 3072]"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1, 2]}, "holds 2 images and 3 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": ["a", "b"]}, "integer labels"),
        ([1, 2], "holds a list, not a dict"),
        (Path("/tmp"), "is not data but code"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(batch: object, said: str, tmp_path: Path) -> None:
    write_format("cifar10 protocol 2", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    assert said in refused(f"cifar10:{tmp_path}")


def test_a_cut_off_pickle_is_refused(tmp_path: Path) -> None:
    write_format("cifar10 protocol 2", tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:5000])
    assert "test_batch' is not a whole pickle" in refused(f"cifar10:{tmp_path}")


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (trace,))

    write_format("cifar10 protocol 2", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}, protocol=2))
    assert "do not trust the file" in refused(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_1").write_bytes(b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.")
    assert "do not trust the file" in refused(f"cifar10:{tmp_path}")
    assert not trace.exists()


def write_folders(folder: Path, parts: tuple[str, ...] = ("train", "val"), count: int = 6) -> None:
    """Write images of 40x20 whose left half is black, and whose right half says which class and number they have."""
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (40, 20))
                image.paste((100 + 50 * label, 10 * index, 0), (20, 0, 40, 20))
                image.save(folder / part / name / f"{index}.png")


def test_folders_of_images_are_resized_on_their_shorter_side_and_cropped_at_their_centre(tmp_path: Path) -> None:
    write_folders(tmp_path)
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, holdout=0.25)
    require_consistent(data)
    assert (len(data.train), len(data.holdout), len(data.test)) == (9, 3, 12)
    assert data.class_names == ("cat", "dog")
    assert data.test.labels.tolist() == [0] * 6 + [1] * 6
    image = data.test.images(torch.tensor([8]))[0]  # the third dog
    assert image[:, 8, 1].tolist() == [0, 0, 0]
    assert image[:, 8, 14].tolist() == [150, 20, 0]
    assert load_data(f"imagefolder:{tmp_path}").image_size == 224
    assert data.test.images(torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_grey_and_transparent_images_become_rgb_and_other_files_are_passed_over(tmp_path: Path) -> None:
    write_folders(tmp_path)
    Image.new("L", (9, 30), 7).save(tmp_path / "val" / "cat" / "a.JPG", format="jpeg")
    Image.new("RGBA", (30, 9), (1, 2, 3, 0)).save(tmp_path / "val" / "cat" / "b.webp", lossless=True, exact=True)
    (tmp_path / "val" / "cat" / "notes.txt").write_text("no image")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert len(data.test) == 14
    assert data.test.images(torch.arange(14)).shape == (14, 3, 8, 8)


def test_final_figures_are_taken_on_test_where_there_is_one(tmp_path: Path) -> None:
    write_folders(tmp_path, ("train", "val"))
    write_folders(tmp_path, ("test",), count=2)
    assert len(load_data(f"imagefolder:{tmp_path}").test) == 4


def test_folders_that_are_not_as_they_should_be_are_refused(tmp_path: Path) -> None:
    assert "no class folders in train/" in refused(f"imagefolder:{tmp_path}")
    write_folders(tmp_path, ("train",))
    assert "no class folders in test/ or val/" in refused(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "horse").mkdir(parents=True)
    assert "has the class 'horse'" in refused(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "horse").rename(tmp_path / "val" / "cat")
    assert "val' has no images in its class folders" in refused(f"imagefolder:{tmp_path}")


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_folders(tmp_path)
    path = tmp_path / "val" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    with pytest.raises(InputError, match=r"dog/3\.png' is not a whole image"):
        data.test.images(torch.arange(12))


def test_unknown_data_is_refused_with_what_there_is() -> None:
    message = refused("cifar11:somewhere")
    assert "did you mean cifar10" in message
    assert "digits, cifar10:DIR, cifar100:DIR, imagefolder:DIR, path/to/file.py:function" in message
    assert "unknown data" in refused("")
    assert "names no folder; write cifar10:DIR" in refused("cifar10")
    assert "names no folder; write imagefolder:DIR" in refused("imagefolder:")
    assert "write digits" in refused("digits:somewhere")
    assert "images of 8x8, not 32" in refused("digits", image_size=32)
    assert "image size is 0" in refused("digits", image_size=0)
    assert load_data("digits", image_size=8).image_size == 8


DATA_FILE = """
import torch
from prune2deploy.data import Data, TensorSplit

def split(count=4, label=0, dtype=torch.uint8, side=5):
    return TensorSplit(torch.zeros(count, 2, side, side, dtype=dtype), torch.full((count,), label))

def data(**changes):
    options = dict(name="mine", train=split(), holdout=split(), test=split(), num_classes=3,
                   class_names=("a", "b", "c"), mean=(0.0, 0.0), std=(1.0, 1.0), in_channels=2, image_size=5)
    return Data(**(options | changes))

def make(seed, holdout): return data(name=f"{seed} {holdout}")
def empty(): return data(holdout=split(0))
def wrong_label(): return data(test=split(label=3))
def wrong_type(): return data(train=split(dtype=torch.float32))
def wrong_size(): return data(train=split(side=6))
def float_labels(): return data(train=TensorSplit(split().pixels, torch.zeros(4)))
def text(): return "data"
def raises(): raise OSError("no disk")
"""


def test_a_users_function_gives_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DATA_FILE)
    data = load_data(f"{tmp_path / 'mine.py'}:make", seed=4, holdout=0.2)
    require_consistent(data)
    assert data.name == "4 0.2"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("empty", "holdout: no images"),
        ("wrong_label", "test: labels lie outside 0..2"),
        ("wrong_type", "train: images are torch.float32 [1, 2, 5, 5]; torch.uint8 [1, 2, 5, 5] is wanted"),
        ("wrong_size", "train: images are torch.uint8 [1, 2, 6, 6]"),
        ("float_labels", "train: labels are torch.float32 [4]"),
        ("text", "returned a str"),
        ("raises", "raised OSError: no disk"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_a_users_function_that_gives_something_else_is_refused(function: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DATA_FILE)
    assert said in refused(f"{tmp_path / 'mine.py'}:{function}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Return an image [C, H, W] moved by whole pixels, zeros moving in: one at a time, as a check."""
    _, height, width = image.shape
    moved = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                moved[:, row, column] = image[:, row - down, column - right]
    return moved


def test_augmentation_shifts_each_image_by_whole_pixels_and_mirrors_about_half() -> None:
    images = torch.rand(64, 3, 6, 5, generator=generator(1)) + 0.1
    result = augment(images, generator(), flip=True, pad=1)
    assert result.shape == images.shape
    found = []
    for image, changed in zip(images, result, strict=True):
        matches = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(shifted(image, down, right).flip(2) if mirrored else shifted(image, down, right), changed)
        ]
        assert len(matches) == 1
        found += matches
    assert 16 < sum(mirrored for mirrored, _, _ in found) < 48
    assert len({(down, right) for _, down, right in found}) == 9


def test_augmentation_without_padding_and_mirroring_changes_nothing() -> None:
    images = torch.rand(8, 1, 4, 4)
    assert torch.equal(augment(images, generator(), flip=False, pad=0), images)


def test_augmentation_depends_on_its_generator_only() -> None:
    images = torch.rand(32, 3, 8, 8)
    torch.manual_seed(1)
    first = augment(images, generator(5), flip=True, pad=2)
    torch.manual_seed(2)
    assert torch.equal(first, augment(images, generator(5), flip=True, pad=2))
    assert not torch.equal(first, augment(images, generator(6), flip=True, pad=2))


def test_normalisation_scales_bytes_and_takes_constants_per_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert normalise(images, (0.5, 0.5), (0.5, 0.25)).flatten().tolist() == [-1.0, 2.0]
    assert normalise(images, (0.0,), (1.0,)).flatten().tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="mean has 3 values for images of 2 channels"):
        normalise(images, (0.5,) * 3, (1.0,) * 3)
    with pytest.raises(InputError, match="above 0"):
        normalise(images, (0.5,), (0.0,))


def test_a_split_in_memory_gives_the_images_that_are_asked_for_in_their_order() -> None:
    split = TensorSplit(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4))
    assert split.images(torch.tensor([3, 0, 3])).flatten().tolist() == [3, 0, 3]


def test_batches_are_of_one_size_normalised_and_the_same_every_time() -> None:
    split = TensorSplit(torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1), torch.arange(11))
    batches = Batches(split, (0.5,), (0.25,), batch_size=4, seed=3)
    taken = list(batches)
    assert [len(labels) for _, labels in taken] == [4, 4]
    labels = torch.cat([labels for _, labels in taken])
    assert len(set(labels.tolist())) == 8
    assert not torch.equal(labels, labels.sort().values)
    expected = normalise(labels.to(torch.uint8).view(8, 1, 1, 1), (0.5,), (0.25,))
    assert torch.equal(torch.cat([images for images, _ in taken]), expected)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(taken, batches, strict=True))
    other = Batches(split, (0.5,), (0.25,), batch_size=4, seed=4)
    assert not torch.equal(torch.cat([labels for _, labels in other]), labels)


def test_what_is_left_over_is_a_last_smaller_batch_where_all_are_wanted() -> None:
    split = TensorSplit(torch.zeros(11, 1, 1, 1, dtype=torch.uint8), torch.arange(11))
    taken = list(Batches(split, (0.5,), (0.25,), batch_size=4, rest=True))
    assert [len(labels) for _, labels in taken] == [4, 4, 3]
    assert torch.cat([labels for _, labels in taken]).sort().values.tolist() == list(range(11))


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    split = TensorSplit(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.arange(3))
    assert [len(labels) for _, labels in Batches(split, (0.5,), (0.25,), batch_size=8)] == [3]
    assert [len(labels) for _, labels in Batches(split, (0.5,), (0.25,), batch_size=8, images=2)] == [2]
