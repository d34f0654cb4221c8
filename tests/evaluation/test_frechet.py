"""Fréchet distance against closed forms and SciPy, moments, statistics and their files, metrics."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from fid_helpers import Tiny, tiny, write_pictures
from PIL import Image
from pipelines import make_pipeline
from processes import CONTEXT
from torch import Tensor

from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.features.frechet import bias_warning, frechet_distance
from tarflow.evaluation.features.metrics import calculate, chosen_metrics
from tarflow.evaluation.features.statistics import Moments, Statistics, compute_statistics
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reports.fid import readable
from tarflow.training.flow import metric
from tarflow.training.flow.config import MetricConfig


def covariance(dims: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(dims, rank or 2 * dims, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


class TestFrechetDistance:
    def test_equal_gaussians(self) -> None:
        mean, cov = torch.randn(6, dtype=torch.float64), covariance(6)
        assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-12)

    def test_shifted_mean(self) -> None:
        cov, shift = covariance(6), torch.randn(6, dtype=torch.float64)
        assert frechet_distance(shift, cov, 0 * shift, cov) == pytest.approx(float(shift.square().sum()), rel=1e-10)

    def test_commuting_covariances(self) -> None:
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        a, b = torch.rand(2, 6, dtype=torch.float64)
        zero = torch.zeros(6)
        found = frechet_distance(zero, basis * a @ basis.T, zero, basis * b @ basis.T)
        assert found == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-10)

    @pytest.mark.parametrize("dims", [1, 2, 40])
    def test_root_of_scipy(self, dims: int) -> None:
        means, (a, b) = torch.randn(2, dims, dtype=torch.float64), [covariance(dims) for _ in range(2)]
        root = scipy.linalg.sqrtm((a @ b).numpy()).real
        wanted = (means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * np.trace(root)
        assert frechet_distance(means[0], a, means[1], b) == pytest.approx(float(wanted), rel=1e-9)

    def test_singular_covariances(self) -> None:
        """Of rank 5 in 60 dimensions: zero to itself, and the closed form in subspaces that are orthogonal."""
        zero, cov = torch.zeros(60), covariance(60, rank=5)
        assert frechet_distance(zero, cov, zero, cov) == pytest.approx(0, abs=1e-6)
        a, b = torch.zeros(2, 60, 60, dtype=torch.float64)
        a[:5, :5], b[30:40, 30:40] = covariance(5), covariance(10)
        assert frechet_distance(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace()), rel=1e-10)
        a[5, 5] = -1e-14  # as rounding leaves it
        assert math.isfinite(frechet_distance(zero, a, zero, b))
        assert frechet_distance(zero, 0 * a, zero, b) == pytest.approx(float(b.trace()), rel=1e-10)

    def test_symmetric_and_from_float32(self) -> None:
        mean, other, a, b = torch.zeros(8), torch.ones(8), covariance(8).float(), covariance(8).float()
        assert frechet_distance(mean, a, other, b) == pytest.approx(frechet_distance(other, b, mean, a), rel=1e-10)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="same D"):
            frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2))
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(torch.zeros(2), torch.full((2, 2), math.nan), torch.zeros(2), torch.eye(2))

    def test_too_few_samples_are_named(self) -> None:
        assert "biased" in bias_warning(10, 10)
        assert bias_warning(11, 10) is None


class TestMoments:
    @pytest.mark.parametrize("sizes", [[50], [1, 49], [7, 0, 20, 23]])
    def test_streaming_is_numpy(self, sizes: list[int]) -> None:
        features = torch.randn(50, 5, dtype=torch.float64) * 3 + 1e6  # large means cancel in sums of squares
        moments = Moments(5)
        for part in features.split(sizes):
            moments.update(part)
        assert moments.count == 50
        torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-14, atol=0)
        wanted = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
        torch.testing.assert_close(moments.covariance, wanted, rtol=1e-10, atol=1e-10)

    def test_merge(self) -> None:
        features = torch.randn(30, 4, dtype=torch.float64)
        whole, first, second = Moments(4), Moments(4), Moments(4)
        whole.update(features)
        first.update(features[:9])
        second.update(features[9:])
        first.merge(second)
        first.merge(Moments(4))
        torch.testing.assert_close(first.covariance, whole.covariance)
        assert first.count == 30

    def test_bad_input(self) -> None:
        moments = Moments(3)
        with pytest.raises(ValueError, match="expected features"):
            moments.update(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="not finite"):
            moments.update(torch.full((2, 3), math.inf))
        moments.update(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="at least 2"):
            _ = moments.covariance


class TestStatistics:
    def test_batches_do_not_matter(self, tmp_path: Path) -> None:
        images, extractor = open_images(write_pictures(tmp_path)), tiny()
        whole, parts = compute_statistics(images, extractor, 8), compute_statistics(images, extractor, 3)
        torch.testing.assert_close(whole.moments.covariance, parts.moments.covariance)
        features = extractor(next(images.batches(8)))
        torch.testing.assert_close(parts.features, features)
        kept = compute_statistics(images, extractor, 8, keep_features=3).features
        torch.testing.assert_close(kept, features[[0, 2, 5]])
        assert compute_statistics(images, extractor, keep_features=0).features is None

    def test_save_and_load(self, tmp_path: Path) -> None:
        extractor = tiny()
        statistics = compute_statistics(open_images(write_pictures(tmp_path / "a")), extractor)
        statistics.save(tmp_path / "stats")
        found = Statistics.load(tmp_path / "stats", extractor)
        assert torch.equal(found.moments.covariance, statistics.moments.covariance)
        assert torch.equal(found.features, statistics.features)
        assert found.about() == statistics.about()
        assert not list((tmp_path / "stats").glob("*.tmp"))

    def test_other_extractors_are_refused(self, tmp_path: Path) -> None:
        compute_statistics(open_images(write_pictures(tmp_path / "a")), tiny()).save(tmp_path / "stats")
        with pytest.raises(ValueError, match="their extractor's weights is"):
            Statistics.load(tmp_path / "stats", tiny(seed=1))
        with pytest.raises(ValueError, match="preprocessing is 'none', expected 'crop'"):
            Statistics.load(tmp_path / "stats", Extractor("tiny", Tiny(), "crop", "tests"))
        with pytest.raises(ValueError, match="of another extractor"):
            calculate(Statistics.load(tmp_path / "stats"), open_images(tmp_path / "a"), tiny(seed=1))

    def test_broken_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no statistics"):
            Statistics.load(tmp_path)
        compute_statistics(open_images(write_pictures(tmp_path / "a")), tiny()).save(tmp_path)
        (tmp_path / "moments.safetensors").write_bytes((tmp_path / "moments.safetensors").read_bytes()[:-9])
        with pytest.raises(ValueError, match="cut off or broken"):
            Statistics.load(tmp_path)

    def test_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_pictures(tmp_path / "a")
        first = compute_statistics(open_images(folder), tiny(), cache_dir=tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr("tarflow.evaluation.features.statistics.extract", lambda *_: pytest.fail("computed again"))
            again = compute_statistics(open_images(folder), tiny(), cache_dir=tmp_path / "cache")
        assert torch.equal(again.moments.mean, first.moments.mean)
        compute_statistics(open_images(folder), tiny(seed=1), cache_dir=tmp_path / "cache")
        write_pictures(folder, 1, seed=9)
        compute_statistics(open_images(folder), tiny(), cache_dir=tmp_path / "cache")
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_too_few_pictures(self, tmp_path: Path) -> None:
        one = open_images(write_pictures(tmp_path, 3), num=1)
        with pytest.raises(ValueError, match="at least 2"):
            compute_statistics(one, tiny())
        three = open_images(tmp_path)
        with pytest.raises(ValueError, match="at least 4 pictures"):
            calculate(three, three, tiny())
        assert calculate(three, three, tiny(), ["frechet"]) == {"frechet_distance": pytest.approx(0, abs=1e-6)}


def work(process: int, folder: str) -> None:
    """One of two processes: statistics of a folder, and the error of another one with a broken picture."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    statistics = compute_statistics(open_images(f"{folder}/a"), tiny(), batch_size=2, cache_dir=f"{folder}/cache")
    statistics.save(f"{folder}/{process}")
    with pytest.raises(ValueError, match=r"cannot read the image .*00006\.png"):
        compute_statistics(open_images(f"{folder}/broken"), tiny(), batch_size=2)
    torch.distributed.destroy_process_group()


def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    """Seven pictures in batches of two: four batches, of which the last is half full."""
    for name in ("a", "broken"):
        Image.new("L", (32, 32)).save(write_pictures(tmp_path / name, 7) / "00003.png")
    file = tmp_path / "broken/00006.png"
    file.write_bytes(file.read_bytes()[:300])
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method=CONTEXT.get_start_method())
    compute_statistics(open_images(tmp_path / "a"), tiny(), batch_size=2).save(tmp_path / "one")
    wanted = (tmp_path / "one/moments.safetensors").read_bytes()
    assert b"greyscale" in wanted
    for folder in (tmp_path / "0", tmp_path / "1", *(tmp_path / "cache").iterdir()):
        assert (folder / "moments.safetensors").read_bytes() == wanted


class TestMetrics:
    def test_equal_to_torch_fidelity(self, tmp_path: Path) -> None:
        """On pictures, with the same network registered there."""
        import torch_fidelity
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        class Registered(FeatureExtractorBase):
            def __init__(self, name: str, features_list: list[str], **_: Any):
                super().__init__(name, features_list)
                self.network = Tiny()

            @staticmethod
            def get_provided_features_list() -> tuple[str, ...]:
                return ("features",)

            @staticmethod
            def get_default_feature_layer_for_metric(metric: str) -> str:
                return "features"

            def forward(self, images: Tensor) -> tuple[Tensor]:
                return (self.network(images),)

        class Pictures(torch.utils.data.Dataset):
            def __init__(self, folder: Path):
                self.pictures = next(open_images(folder).batches(100))

            def __len__(self) -> int:
                return len(self.pictures)

            def __getitem__(self, index: int) -> Tensor:
                return self.pictures[index]

        real, drawn = write_pictures(tmp_path / "real", 40), write_pictures(tmp_path / "drawn", 30, seed=1)
        FEATURE_EXTRACTORS_REGISTRY["tarflow-test"] = Registered
        try:
            wanted = torch_fidelity.calculate_metrics(
                input1=Pictures(drawn),
                input2=Pictures(real),
                feature_extractor="tarflow-test",
                cuda=False,
                cache=False,
                verbose=False,
                save_cpu_ram=True,
                fid=True,
                kid=True,
                prc=True,
                kid_subset_size=30,
            )
        finally:
            del FEATURE_EXTRACTORS_REGISTRY["tarflow-test"]
        found = calculate(open_images(real), open_images(drawn), tiny())
        names = {
            "frechet_distance": "frechet_inception_distance",
            "kernel_distance": "kernel_inception_distance_mean",
            "kernel_distance_std": "kernel_inception_distance_std",
            "precision": "precision",
            "recall": "recall",
        }
        assert found == {name: pytest.approx(wanted[other], rel=1e-4, abs=1e-7) for name, other in names.items()}

    def test_inception_score_and_names(self, tmp_path: Path) -> None:
        """With the tiny network in Inception's place: its head gives the Inception Score, and names are FID and KID."""
        extractor = Extractor("inception", Tiny(), "none", "tests", head=torch.randn(7, 4))
        images = open_images(write_pictures(tmp_path, 20))
        found = calculate(images, images, extractor)
        assert {"fid", "kid", "precision", "recall", "inception_score"} < set(found)
        assert found["precision"] == found["recall"] == 1
        probabilities = (extractor(next(images.batches(20))) @ extractor.head.T).double().softmax(1)
        order = np.random.RandomState(2020).permutation(20)
        scores = []
        for part in probabilities[torch.from_numpy(order)].split(2):
            scores.append((part * (part / part.mean(0)).log()).sum(1).mean().exp())
        assert found["inception_score"] == pytest.approx(float(torch.stack(scores).mean()), rel=1e-6)
        assert extractor.metric_name == readable("fid", extractor) == "FID"
        with pytest.raises(ValueError, match="cannot be had with the extractor 'tiny'"):
            calculate(images, images, tiny(), ["inception_score"])

    def test_while_training_pictures_of_all_classes_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of twelve that are sorted by class, four lie evenly, and samples have their labels in turn."""
        held_out = [{"image": torch.full((3, 8, 8), i, dtype=torch.uint8), "label": i // 4} for i in range(12)]
        monkeypatch.setattr(metric, "load_extractor", lambda *_: tiny())
        found = metric.SampleMetric(MetricConfig(images=4, batch_size=3), held_out, torch.device("cpu"))
        assert [batch[:, 0, 0, 0].tolist() for batch in found.pictures(None)] == [[0, 3, 6], [9]]
        found.config = MetricConfig(images=6, batch_size=6)
        pipe = make_pipeline()
        labels: list[list[int]] = []
        call = type(pipe).__call__
        monkeypatch.setattr(
            type(pipe), "__call__", lambda self, **o: labels.append(o["class_labels"]) or call(self, **o)
        )
        assert next(found.samples(pipe)).shape[:2] == (6, 3)
        assert labels == [[0, 0, 1, 2, 0, 0]]

    def test_without_torch_fidelity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("torch_fidelity", "torch_fidelity.feature_extractor_base", "torch_fidelity.registry"):
            monkeypatch.setitem(sys.modules, name, None)
        assert chosen_metrics(tiny(), ["frechet"]) == ("frechet",)
        with pytest.raises(ValueError, match="torch-fidelity is not installed"):
            chosen_metrics(tiny(), None)
