"""Streams where pictures by number were: other trainings than the flow's, and evaluations."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import autoencoders
import decoders
import numpy as np
import pytest
import students
import torch
from fid_helpers import tiny
from PIL import Image
from safetensors.torch import load_file
from stream_helpers import config, number_of, png, row, tar_bytes, tar_shards, write

from tarflow.cli.captions import CaptionScoreConfig, pictures_and_captions
from tarflow.common.arguments import parse_dataclass
from tarflow.data.config import DataConfig, MixedSource
from tarflow.data.stream.first import FirstCaptions, open_pictures
from tarflow.data.stream.rows import RowReader
from tarflow.data.stream.stream import Stream
from tarflow.evaluation.conditions import caption_conditions, data_label_counts
from tarflow.evaluation.features.statistics import compute_statistics
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.likelihood.held_out import evaluate_likelihood
from tarflow.experiments.peers.settings import PeersComparison
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.mixture import open_sources
from tarflow.training.loop.streaming import Share, StreamReader


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def sources(*found: dict[str, Any]) -> list[str]:
    return ["--sources", json.dumps({f"s{number}": source for number, source in enumerate(found)})]


def shards(base: str, size: int, **changes: Any) -> dict[str, Any]:
    """A data section of tar files as JSON has it."""
    path = tar_shards(base, [20, 13, 30, 11], (size, size))
    settings = {"source": "webdataset", "path": path, "image_size": size, "shuffle_buffer": 16}
    return {**settings, "validation_fraction": 0.2, **changes}


class TestAutoencoders:
    def test_one_that_goes_on_is_the_same_to_the_bit(self, tmp_path: Path) -> None:
        mixed = sources({"data": shards("memory://vae", 32)}, {"data": {"source": "drawings", "image_size": 32}})
        settings = [*mixed, "--steps", "4", "--checkpoint_every", "2"]
        whole = autoencoders.train(tmp_path / "whole", *settings)
        assert {"psnr_s0", "psnr_s1"} <= set(whole)
        checkpoint = tmp_path / "whole_run" / "checkpoints" / "step_00000002"
        autoencoders.train(tmp_path / "again", *settings, "--resume", str(checkpoint))
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))
        with pytest.raises(ValueError, match="was trained on a stream, but the data here is pictures by number"):
            autoencoders.train(tmp_path / "other", "--steps", "4", "--resume", str(checkpoint))
        autoencoders.train(tmp_path / "drawings", "--steps", "1", "--checkpoint_every", "1")
        resume = ["--resume", str(tmp_path / "drawings_run" / "checkpoints" / "step_00000001")]
        with pytest.raises(ValueError, match="was trained on pictures by number, but the data here is a stream"):
            autoencoders.train(tmp_path / "other", *settings, *resume)
        assert not (tmp_path / "other_run").exists()

    def test_sources_come_by_their_shares_each_picture_once_a_pass(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tar files, two of them as one source, and a folder: mirrored where it is wished, as pictures alone."""
        (tmp_path / "folder").mkdir()
        for number in range(200, 207):
            (tmp_path / "folder" / f"{number}.png").write_bytes(png(number))
        folder = {"source": "folder", "path": str(tmp_path / "folder"), "image_size": 8, "validation_fraction": 0}
        mix = {"a": {"path": tar_shards("memory://a", [20], (8, 8)), "label_column": "cls"}}
        mix["b"] = {"path": "memory://b.tar", "caption_column": "txt"}
        write("memory://b.tar", tar_bytes([row(number) for number in range(100, 120)], 100))
        settings = {"source": "webdataset", "image_size": 8, "validation_fraction": 0, "mix": mix}
        argv = sources({"data": settings, "share": 3}, {"data": folder, "share": 1})
        stream = open_sources(parse_dataclass(TrainVaeConfig, [*argv, "--output", "x", "--init_from", "y"])[0])
        assert isinstance(stream, Stream)
        told: list[str] = []
        monkeypatch.setattr("tarflow.training.loop.streaming.say_once", told.append)
        with StreamReader(stream, Share(20, 0, 1, 1), 0, 0) as reader:
            batches = [next(reader) for _ in range(20)]
        assert all(batch.keys() == {"image", "key", "skipped"} for batch in batches)
        seen = Counter(number_of({"image": image}) for batch in batches for image in batch["image"])
        assert sum(count for number, count in seen.items() if number >= 200) == pytest.approx(100, abs=30)
        assert seen.keys() == {*range(20), *range(100, 120), *range(200, 207)}
        assert len(told) == 2  # of tar files that are read several times, not of the folder

    def test_half_of_a_stream_is_mirrored_where_it_is_wished(self) -> None:
        file = io.BytesIO()
        Image.fromarray(np.arange(8, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)).save(file, "PNG")
        write("memory://flip.tar", tar_bytes([{"png": file.getvalue()}] * 40))
        for flip, lefts in ((False, {0: 40}), (True, {0: 20, 7: 20})):
            data = {"source": "webdataset", "path": "memory://flip.tar", "image_size": 8, "validation_fraction": 0}
            argv = [*sources({"data": {**data, "flip": flip}}), "--output", "x", "--init_from", "y"]
            seen = []
            for _ in range(2):
                stream = open_sources(parse_dataclass(TrainVaeConfig, argv)[0])
                assert isinstance(stream, Stream)
                seen.append([int(row["image"][0, 0, 0]) for row in (stream[number] for number in range(40))])
            assert seen[0] == seen[1]
            assert dict(Counter(seen[0])) == pytest.approx(lefts, abs=7)

    def test_none_of_several_sources_takes_another_ones_place(self) -> None:
        path = tar_shards("memory://names", [3], (8, 8))
        common = {"source": "webdataset", "image_size": 8}
        found = {"a": {"data": {**common, "mix": {"b c": {"path": path}}}}}
        found["a b"] = {"data": {**common, "mix": {"c": {"path": path}}}}
        argv = ["--sources", json.dumps(found), "--output", "x", "--init_from", "y"]
        stream = open_sources(parse_dataclass(TrainVaeConfig, argv)[0])
        assert isinstance(stream, Stream)
        assert stream.weights == [1, 1]

    def test_what_does_not_fit_is_one_sentence(self) -> None:
        first, second = shards("memory://c", 8, lanes=2), shards("memory://d", 8, lanes=3)
        for argv, message in (
            (sources({"data": first}, {"data": second}), r"the sources have different data.lanes, \[2, 3\]"),
            (sources({"data": {**first, "aspect_ratios": ["1:1"]}}), "data.aspect_ratios is set, but only flows"),
        ):
            settings = parse_dataclass(TrainVaeConfig, [*argv, "--output", "x", "--init_from", "y"])[0]
            with pytest.raises(ValueError, match=message):
                open_sources(settings)


class TestComponents:
    @pytest.mark.parametrize(
        ("part", "tiny_pipeline", "train", "columns"),
        [
            ("finetuned_decoder", decoders.tiny_pipeline, decoders.finetune, {"flip": True}),
            ("student", students.tiny_pipeline, students.train, {"label_column": "cls"}),
        ],
    )
    def test_what_goes_on_is_the_same_to_the_bit(
        self, tmp_path: Path, part: str, tiny_pipeline: Any, train: Any, columns: dict[str, Any]
    ) -> None:
        stream = shards(f"memory://{part}", 16, **columns)
        data = [word for name, value in stream.items() for word in (f"--data.{name}", str(value).lower())]
        if "label_column" in columns:
            data += ["--data.class_names", json.dumps([str(number) for number in range(36)])]
        found = []
        for name, *resume in (("a",), ("b", "--resume", str(tmp_path / "a" / "checkpoints" / "step_00000002"))):
            tiny_pipeline(tmp_path / name / "pipeline")
            options = [*data, *resume, "--steps", "4", "--checkpoint_every", "2"]
            metrics = train(tmp_path / name / "pipeline", tmp_path / name, *options)
            found.append((metrics, weights(tmp_path / name / "pipeline" / part)))
        assert found[0][0] == found[1][0]
        assert same(found[0][1], found[1][1])
        with pytest.raises(ValueError, match="was trained on a stream, but the data here is pictures by number"):
            train(
                tmp_path / "b" / "pipeline", tmp_path / "c", "--resume", str(tmp_path / "a/checkpoints/step_00000002")
            )

    def test_a_stream_shorter_than_a_step_is_refused(self, tmp_path: Path) -> None:
        decoders.tiny_pipeline(tmp_path / "pipeline")
        path = tar_shards("memory://short", [5], (16, 16))
        data = ["--data.source", "webdataset", "--data.path", path, "--data.validation_fraction", "0"]
        with pytest.raises(ValueError, match="has only 5 training rows, fewer than the 8 pictures of a step"):
            decoders.finetune(tmp_path / "pipeline", tmp_path / "run", *data)


class TestEvaluations:
    def test_reference_statistics(self) -> None:
        """Those of the first rows of the shards in turn, each once; the same for two processes' batches."""
        settings = config(tar_shards("memory://ref", [6, 9], (8, 8)), lanes=2)
        images = open_images(settings, "train", num=13)
        batches = list(images.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 4, 1]
        numbers = [number_of({"image": image}) for batch in batches for image in batch]
        assert numbers == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11, 12]
        halves = [list(images.batches(4, process, 2)) for process in range(2)]
        assert all(torch.equal(halves[number % 2][number // 2], batch) for number, batch in enumerate(batches))
        statistics = compute_statistics(images, extractor := tiny(), 4)
        expected = extractor(torch.cat(batches)).double().mean(0)
        np.testing.assert_allclose(statistics.moments.mean, expected, atol=1e-6)
        assert images.fingerprint == open_images(settings, "train", num=13).fingerprint
        write("memory://ref/001.tar", tar_bytes([row(number) for number in range(20, 29)], 6))
        assert images.fingerprint != open_images(settings, "train", num=13).fingerprint

    def test_pictures_that_cannot_be_read(self) -> None:
        rows = [row(number) for number in range(6)]
        rows[2]["png"], rows[5]["png"] = b"nothing", b"nothing"
        write("memory://broken.tar", tar_bytes(rows))
        with pytest.raises(ValueError, match=r"'x/00002' of the shard 'memory://broken\.tar'"):
            list(open_images(config("memory://broken.tar"), num=6).batches(4))
        images = open_images(config("memory://broken.tar", on_error="skip"), num=6)
        numbers = [number_of({"image": image}) for batch in images.batches(4) for image in batch]
        assert numbers == [0, 1, 3, 3, 4, 4]
        assert images.notes == ["2 of the pictures: unreadable and replaced by others"]

    def test_numbers_of_pictures(self) -> None:
        settings = config(tar_shards("memory://numbers", [6, 9], (8, 8)))
        with pytest.raises(ValueError, match="does not tell how many pictures it has: say how many to take with num"):
            open_images(settings)
        with pytest.raises(ValueError, match=r"does not tell how many pictures it has: say how many .* by num_images"):
            open_pictures(settings, "train", None, "num_images")
        with pytest.raises(ValueError, match=r"16 pictures are asked for, but .* has 15"):
            list(open_images(settings, num=16).batches(4))

    def test_a_split_without_pictures_is_told_without_reading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []
        monkeypatch.setattr(RowReader, "wanted", lambda self, row: read.append(row.number) or True)
        settings = config(tar_shards("memory://none", [3], (8, 8)))
        with pytest.raises(ValueError, match="the data's split 'validation' is empty"):
            caption_conditions("data", settings, "validation").values([0])
        with pytest.raises(ValueError, match=r"2 pictures are asked for, but .* has 0"):
            list(open_images(settings, "validation", num=2).batches(4))
        assert read == []

    def test_captions_are_taken_in_their_order(self) -> None:
        settings = config(tar_shards("memory://captions", [3, 2], (8, 8)), lanes=1)
        found = caption_conditions("data", settings, "train")
        assert found.values([4, 5]) == ["picture 4, red, round", "picture 0, red, round"]
        assert found.summary["count"] is None
        with pytest.raises(ValueError, match="the data's split 'train' has no captions"):
            FirstCaptions(config("memory://captions/000.tar", caption_column=None), "train")

    def test_labels_are_counted_as_of_folders(self) -> None:
        """Of all rows of a split, and of several streams by their weights."""
        labels = {"label_column": "cls", "class_names": ["even", "odd"]}
        path = tar_shards("memory://labels", [7, 6, 2], (8, 8))
        settings = config(path, **labels, where={"number": [0, 1, 3, 5, 7, 9, 14]})
        assert data_label_counts(settings, "train", 3) == [2, 5, 0]
        rows = [{**row(number), "cls": b"0"} for number in range(4)]
        write("memory://labels/even.tar", tar_bytes(rows))
        mix = {"a": MixedSource(path=path, weight=3), "b": MixedSource(path="memory://labels/even.tar", weight=1)}
        counts = data_label_counts(config(None, mix=mix, **labels), "train", 2)
        assert [count / sum(counts) for count in counts] == pytest.approx([0.75 * 8 / 15 + 0.25, 0.75 * 7 / 15])
        write("memory://labels/001.tar", tar_bytes([{**row(7), "cls": b"zebra"}], 7))
        with pytest.raises(ValueError, match=r"'x/00007' of the shard 'memory://labels/001.tar' has the label 'zebra'"):
            data_label_counts(config(path, **labels), "train", 2)
        assert sum(data_label_counts(config(path, **labels, on_error="skip"), "train", 2)) == 9
        for settings, split, message in (
            (config(path), "train", "the data's split 'train' has no class labels to draw from"),
            (config(path, **labels), "validation", "the data's split 'validation' is empty"),
            (
                config(path, label_column="cls", class_names=["a", "b", "c"]),
                "train",
                "has labels 0 to 2, but the model 0 to 1",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                data_label_counts(settings, split, 2)

    def test_captions_of_pictures_that_are_measured(self) -> None:
        path = tar_shards("memory://told", [3, 4], (8, 8))
        images: Any = open_images(config(path, lanes=2), num=5)
        numbers = [number_of({"image": image}) for batch in images.batches(4) for image in batch]
        assert images.captions() == [f"picture {number}, red, round" for number in numbers]
        shown, captions = pictures_and_captions(CaptionScoreConfig(model="x", data=config(path), split="train", num=7))
        assert (len(shown), len(captions)) == (7, 7)
        folder: Any = open_images(DataConfig(image_size=8), num=3)
        assert len(folder.captions()) == 3
        with pytest.raises(ValueError, match="the data has no captions"):
            open_images(config(path, caption_column=None), num=2).captions()  # type: ignore[attr-defined]

    def test_comparisons_that_want_pictures_by_number_say_so(self) -> None:
        with pytest.raises(ValueError, match="data is a stream, but the comparison takes pictures by number"):
            PeersComparison(data=config("x.tar"))

    def test_likelihood(self, tmp_path: Path) -> None:
        pipe = decoders.tiny_pipeline(tmp_path / "pipeline")
        path = tar_shards("memory://likelihood", [4, 8], (16, 16))
        settings = DataConfig(source="webdataset", path=path, image_size=16, validation_fraction=0.5)
        images = open_pictures(settings, "validation", 3, "num_images")
        assert evaluate_likelihood(pipe, images, 3, draws=1).images == 3
