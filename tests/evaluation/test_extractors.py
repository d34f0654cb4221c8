"""Networks that give features, small and random; CLIP score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from fid_helpers import Tiny, save_backbone, save_clip, write_pictures
from helpers import SHARED
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTImageProcessor,
)

from tarflow.evaluation.features.backbones import VisionFeatures
from tarflow.evaluation.features.clip_score import clip_score
from tarflow.evaluation.features.extractors import load_extractor
from tarflow.evaluation.images.sets import open_images


class TestExtractors:
    def test_torchvision(self, tmp_path: Path) -> None:
        path = save_backbone(tmp_path / "x.pth", "mobilenet_v2")
        extractor = load_extractor("mobilenet_v2", str(path))
        network = torchvision.models.mobilenet_v2()
        network.load_state_dict(torch.load(path, weights_only=True))
        images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            wanted = network.eval().features((images / 255 - mean) / std).mean((2, 3))
        torch.testing.assert_close(extractor(images), wanted, rtol=1e-4, atol=1e-5)
        assert (extractor.dims, extractor.is_fid) == (1280, False)
        assert extractor.metric_name == "Fréchet distance (mobilenet_v2)"
        save_file(network.state_dict(), tmp_path / "x.safetensors")
        other = load_extractor("mobilenet_v2", str(tmp_path / "x.safetensors"))
        assert other.fingerprint == extractor.fingerprint
        half = load_extractor("mobilenet_v2", str(path), normalize="half")
        assert half.fingerprint != extractor.fingerprint

    @pytest.mark.parametrize("kind", ["dinov2", "clip", "path"])
    def test_transformers(self, tmp_path: Path, kind: str) -> None:
        if kind == "clip":
            save_clip(tmp_path)
        else:
            config = Dinov2Config(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
            )
            Dinov2Model(config).save_pretrained(tmp_path)
        extractor = load_extractor(str(tmp_path)) if kind == "path" else load_extractor(kind, str(tmp_path))
        assert extractor.metric_name == f"Fréchet distance ({tmp_path.name if kind == 'path' else kind})"
        features = extractor(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
        assert features.shape == (2, extractor.dims)
        assert not torch.equal(features[0], features[1])
        if kind == "dinov2":
            images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            model = Dinov2Model.from_pretrained(tmp_path).eval()
            with torch.no_grad():
                wanted = model(pixel_values=(images / 255 - mean) / std).pooler_output
            torch.testing.assert_close(extractor(images), wanted)

    def test_models_without_a_class_token_are_pooled(self, tmp_path: Path) -> None:
        swin = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        model = SwinModel(SwinConfig(image_size=32, patch_size=4, **swin)).eval()
        model.save_pretrained(tmp_path / "swin")
        size = {"size": {"height": 32, "width": 32}, "image_mean": None, "image_std": None}
        ViTImageProcessor(**size).save_pretrained(tmp_path / "swin")
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            wanted = model(pixel_values=(images / 255 - mean) / std).pooler_output
        extractor = load_extractor(str(tmp_path / "swin"))
        torch.testing.assert_close(extractor(images), wanted)
        assert extractor.description["preprocessing"].endswith(", pooled tokens")
        model.pooler = None  # as of models that pool nothing
        with torch.no_grad():
            plain = VisionFeatures(model, pools=False)((images / 255 - mean) / std)
        torch.testing.assert_close(plain, wanted)  # which is the mean of tokens here

    def test_sides_of_processors_that_name_the_shortest_edge(self, tmp_path: Path) -> None:
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path)
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(tmp_path)
        extractor = load_extractor(str(tmp_path))
        assert extractor.dims == 8
        described = extractor.description["preprocessing"]
        assert described.startswith("bicubic antialiased to 64, mean") and "tokens" not in described

    def test_bad_weights(self, tmp_path: Path) -> None:
        save_backbone(tmp_path / "x.pth")
        torch.save({"run": Tiny()}, tmp_path / "code.pth")
        (tmp_path / "cut.safetensors").write_bytes(b"12345678")
        (tmp_path / "text.pth").write_text("hello world")
        BertModel(
            BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).save_pretrained(tmp_path / "bert")
        for name, file, message in (
            ("mobilenet_v2", "x.pth", "not those of Torchvision's mobilenet_v2"),
            ("squeezenet1_1", "code.pth", "no whole file of nothing but weights"),
            ("squeezenet1_1", "cut.safetensors", "no whole file of nothing but weights"),
            ("squeezenet1_1", "text.pth", "no whole file of nothing but weights"),
            ("squeezenet1_1", "none.pth", "no file of weights"),
            ("clip", "bert", "no vision model: it takes input_ids"),
            ("inception", "x.pth", "not torch-fidelity's weights of Inception"),
            ("dinov2", "none", "no folder"),
        ):
            with pytest.raises(ValueError, match=message):
                load_extractor(name, str(tmp_path / file))
        for name, message in (
            ("squeezenet", "did you mean squeezenet1"),
            ("resnet18", "needs its"),
            ("clip", "needs its"),
        ):
            with pytest.raises(ValueError, match=message):
                load_extractor(name)

    def test_no_network_for_inception(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def no_network(*_: Any, **__: Any) -> None:
            raise OSError("Name or service not known")

        monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(ValueError, match=r"no network.*give --inception-weights"):
            load_extractor("inception")

    @pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the shared weights of MobileNetV2")
    def test_shared_weights(self) -> None:
        path = SHARED / "data/weights/mobilenet_v2/mobilenet_v2.safetensors"
        extractor = load_extractor("mobilenet_v2", str(path), normalize="half")
        features = extractor(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        assert features.shape == (2, 1280)
        assert 0.1 < float(features.mean()) < 2  # pooled ReLU6 of trained weights


class TestClipScore:
    def test_mean_of_cosines(self, tmp_path: Path) -> None:
        torch.manual_seed(9)  # a model with cosines of both signs
        model = save_clip(tmp_path / "clip")
        images = open_images(write_pictures(tmp_path / "a", 5))
        captions = ["a red circle", "blue", "a green star on white that is longer than the context", "x", "ring"]
        found = clip_score(images, captions, str(model), batch_size=2)
        clip, tokenizer = CLIPModel.from_pretrained(model).eval(), CLIPTokenizer.from_pretrained(model)
        processor = CLIPImageProcessor.from_pretrained(model)
        cosines = []
        for picture, caption in zip(next(images.batches(5)), captions, strict=True):
            pixels = processor(picture, return_tensors="pt")
            with torch.no_grad():
                output = clip(**tokenizer(caption, truncation=True, max_length=12, return_tensors="pt"), **pixels)
            cosines.append(torch.cosine_similarity(output.image_embeds, output.text_embeds))
        wanted = torch.cat(cosines).clamp(min=0).mean() * 100
        assert found == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
        assert float(torch.cat(cosines).min()) < 0 < found

    def test_bad_input(self, tmp_path: Path) -> None:
        images = open_images(write_pictures(tmp_path / "a", 2))
        with pytest.raises(ValueError, match="1 captions for 2"):
            clip_score(images, ["a"], "nowhere")
        with pytest.raises(ValueError, match="no folder"):
            clip_score(images, ["a", "b"], str(tmp_path / "none"))
