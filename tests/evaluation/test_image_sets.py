"""Pictures to be evaluated, and every kind of file that they may be, broken ones too."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_helpers import write_pictures
from PIL import Image

from tarflow.data.config import DataConfig
from tarflow.data.drawings import Drawings
from tarflow.evaluation.images.sets import open_images


class TestImageSets:
    def test_folder_zip_and_array_are_the_same(self, tmp_path: Path) -> None:
        folder = tmp_path / "pictures"
        write_pictures(folder / "00000", 3, seed=0)
        write_pictures(folder / "00001", 4, seed=1)
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
        np.savez(tmp_path / "pictures.npz", pixels)
        np.savez_compressed(tmp_path / "small.npz", pixels)
        sets = [open_images(tmp_path / name) for name in ("pictures", "pictures.zip", "pictures.npz", "small.npz")]
        for images in sets:
            assert (len(images), images.size, images.notes) == (7, (32, 32), [])
            batches = list(images.batches(3))
            assert [len(batch) for batch in batches] == [3, 3, 1]
            assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))
            assert torch.equal(torch.cat(list(images.batches(2, 1, 2))), torch.cat(batches)[[2, 3, 6]])
        assert sets[0].fingerprint == sets[1].fingerprint != sets[2].fingerprint == sets[3].fingerprint
        assert open_images(tmp_path / "pictures", num=6).fingerprint != sets[0].fingerprint
        assert open_images(tmp_path / "pictures", image_size=16).fingerprint != sets[0].fingerprint

    def test_fingerprint_follows_content(self, tmp_path: Path) -> None:
        before = open_images(write_pictures(tmp_path / "a")).fingerprint
        assert open_images(write_pictures(tmp_path / "b")).fingerprint == before
        write_pictures(tmp_path / "b", 1, seed=5)
        assert open_images(tmp_path / "b").fingerprint != before

    def test_conversions_are_said(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, 2)
        grey = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
        Image.fromarray(grey).save(tmp_path / "deep.png")
        Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / "grey.png")
        Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        images = open_images(tmp_path)
        pictures = torch.cat(list(images.batches(8)))
        assert images.notes == [
            "1 of the pictures: 16-bit, reduced to 8 bits",
            "2 of the pictures: greyscale, converted to RGB",
            "1 of the pictures: transparent, put on the background colour",
        ]
        assert torch.equal(pictures[3], pictures[4])  # deep and grey are the same picture
        assert bool((pictures[2] == 255).all())

    def test_data_section(self, tmp_path: Path) -> None:
        images = open_images(DataConfig(image_size=32), "validation", num=5)
        wanted = np.asarray(Drawings("validation", 32)[4]["image"])
        assert torch.equal(torch.cat(list(images.batches(4)))[4], torch.tensor(wanted).permute(2, 0, 1))
        Image.new("L", (40, 30)).save(write_pictures(tmp_path) / "grey.png")
        config = DataConfig(source="folder", path=str(tmp_path), image_size=16, validation_fraction=0)
        images = open_images(config)
        assert sum(len(batch) for batch in images.batches(4)) == 9
        assert images.notes == ["1 of the pictures: greyscale, converted to RGB"]
        assert images.fingerprint != open_images(config, num=8).fingerprint
        with pytest.raises(ValueError, match="no end"):
            open_images(DataConfig())

    def test_mixed_sizes_name_both_files(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, 2)
        Image.new("RGB", (20, 40)).save(tmp_path / "odd.png")
        with pytest.raises(ValueError, match=r"00000\.png has 32×32, odd\.png has 40×20"):
            open_images(tmp_path)
        assert next(open_images(tmp_path, image_size=24).batches(3)).shape == (3, 3, 24, 24)

    def test_truncated_picture_is_named(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, 3)
        broken = tmp_path / "00001.png"
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(ValueError, match=r"cannot read the image .*00001\.png"):
            list(open_images(tmp_path).batches(8))

    def test_damaged_archives_are_named(self, tmp_path: Path) -> None:
        """Archives with a whole list of contents, but broken bytes in between."""
        file = write_pictures(tmp_path / "pictures", 1) / "00000.png"
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(file, "x.png")
        pixels = np.random.default_rng(0).integers(0, 9, (20, 16, 16, 3)).astype(np.uint8)
        np.savez_compressed(tmp_path / "b.npz", pixels)
        for name, message in (("a.zip", r"cannot read the image .*a\.zip/x\.png"), ("b.npz", r"cannot read .*b\.npz")):
            content = bytearray((tmp_path / name).read_bytes())
            content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
            (tmp_path / name).write_bytes(content)
            images = open_images(tmp_path / name, image_size=16)
            with pytest.raises(ValueError, match=message):
                list(images.batches(1))
            with pytest.raises(ValueError, match=message):
                _ = images.fingerprint
        with pytest.raises(ValueError, match=message):
            list(images.batches(2, 9, 10))  # what lies before is read too, as it is compressed

    def test_a_data_section_has_its_own_size(self) -> None:
        with pytest.raises(ValueError, match=r"a data section has its own, data\.image_size"):
            open_images(DataConfig(image_size=32), num=2, image_size=16)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "type float32, expected uint8"),
            ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"shape \(2, 3, 8, 8\), expected \(N, H, W, 3\)"),
            ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, r"expected \(N, H, W, 3\)"),
            ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of an extractor that it does not name"),
            ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "expected an array arr_0"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / "x.npz")

    def test_bad_paths(self, tmp_path: Path) -> None:
        (tmp_path / "cut.npz").write_bytes(b"PK")
        for path, message in (
            ("cut.npz", "cut off"),
            ("no.npz", "no file"),
            ("none", "does not exist"),
            (".", "no images"),
        ):
            with pytest.raises(ValueError, match=message):
                open_images(tmp_path / path)
        write_pictures(tmp_path, 3)
        with pytest.raises(ValueError, match="4 pictures are asked for"):
            open_images(tmp_path, num=4)
        with pytest.raises(ValueError, match="no folders train or val"):
            open_images(tmp_path, "train")
