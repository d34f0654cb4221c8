"""Pipelines saved into folders that hold other things, and loaded again; uploads and downloads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import files_of, small_model

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.pipeline.loading import folder as folder_module
from tarflow.pipeline.loading import hub
from tarflow.pipeline.loading.folder import add_component, is_unused, written_into
from tarflow.pipeline.loading.weight_files import WeightFile, superseded, weight_file
from tarflow.vae.codec import load_autoencoder
from tarflow.vae.decoder import LatentDecoder

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_pipeline(vae: bool = False, **changes) -> TARFlowPipeline:
    arguments = {"in_channels": 3, "num_classes": 3, "conditioning": "class_vectors", **changes}
    torch.manual_seed(arguments["num_classes"])
    autoencoder = load_autoencoder("drawings_emoji_f8c8") if vae else None
    if vae:
        arguments["in_channels"] = 8
    pipe = TARFlowPipeline(small_model(**arguments), autoencoder, noise_std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_weights(left: TARFlowPipeline, right: TARFlowPipeline) -> bool:
    pairs = zip(left.flow.parameters(), right.flow.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    pipe = small_pipeline()
    own = {"README.md": b"my card", ".git/HEAD": b"ref", "notes/today.txt": b"x", "flow/notes.txt": b"y"}
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in own} == own
    pipeline = {INDEX, "pipeline.py", "flow/config.json", f"flow/{WEIGHTS}"}
    assert files_of(tmp_path).keys() == own.keys() | pipeline


def test_a_variant_stands_beside_the_others(tmp_path: Path) -> None:
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path)
    full = (tmp_path / "flow" / WEIGHTS).read_bytes()
    small_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "flow" / WEIGHTS).read_bytes() == full
    assert same_weights(TARFlowPipeline.from_pretrained(tmp_path), pipe)
    half = TARFlowPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert half.flow.dtype == torch.float16


@pytest.mark.parametrize("first", [{"max_shard_size": "100KB"}, {"safe_serialization": False}, {}])
@pytest.mark.parametrize("second", [{"max_shard_size": "200KB"}, {"safe_serialization": False}, {}])
def test_what_is_loaded_is_what_was_saved_last(tmp_path: Path, first: dict, second: dict) -> None:
    old, new = small_pipeline(), small_pipeline(num_classes=4)
    old.save_pretrained(tmp_path, **first)
    new.save_pretrained(tmp_path, **second)
    loaded = TARFlowPipeline.from_pretrained(tmp_path)
    assert loaded.flow.config.num_classes == 4
    assert same_weights(loaded, new)
    fresh = tmp_path / "fresh"
    new.save_pretrained(fresh, **second)
    assert files_of(fresh / "flow").keys() == files_of(tmp_path / "flow").keys()


def test_names_of_weights() -> None:
    assert weight_file(WEIGHTS) == WeightFile("diffusion_pytorch_model", None, "safetensors")
    assert weight_file("model.fp16-00001-of-00003.safetensors") == WeightFile("model", "fp16", "safetensors")
    assert weight_file("model.safetensors.index.fp16.json") == WeightFile("model", "fp16", "safetensors")
    assert weight_file("pytorch_model-00001-of-00002.bin") == WeightFile("pytorch_model", None, "bin")
    for name in ("config.json", "notes.safetensors", "model.txt", "model", "model.index.json", "training_args.bin"):
        assert weight_file(name) is None
    old = ["model.safetensors", "model.fp16.safetensors", "notes.safetensors", "model.safetensors.index.json"]
    assert superseded(old, ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]) == [
        "model.safetensors"
    ]


def test_the_current_folder_a_link_and_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small_pipeline()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = os.stat(".").st_ino
    pipe.save_pretrained(".")
    assert os.stat(".").st_ino == os.stat(tmp_path / "here").st_ino == inode
    assert same_weights(TARFlowPipeline.from_pretrained("."), pipe)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    pipe.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / INDEX).is_file()
    (tmp_path / "nowhere").symlink_to(tmp_path / "later" / "disk")
    pipe.save_pretrained(tmp_path / "nowhere")
    assert (tmp_path / "later" / "disk" / INDEX).is_file()
    pipe.save_pretrained("a/b/c")
    assert same_weights(TARFlowPipeline.from_pretrained("a/b/c"), pipe)


def test_nothing_is_written_beside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = tmp_path.stat().st_mtime_ns
    small_pipeline().save_pretrained(tmp_path / "folder")
    assert tmp_path.stat().st_mtime_ns == before


def test_a_part_that_lies_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, place = small_pipeline(), tmp_path / "pipeline"
    (tmp_path / "other_disk").mkdir()
    place.mkdir()
    (place / "flow").symlink_to(tmp_path / "other_disk")
    (tmp_path / "other_disk" / WEIGHTS).write_text("old")
    replace = os.replace

    def between_disks(source: Path, target: Path) -> None:
        if (tmp_path / "other_disk" in Path(os.path.realpath(target)).parents) != (
            tmp_path / "other_disk" in Path(os.path.realpath(source)).parents
        ):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", between_disks)
    pipe.save_pretrained(place)
    assert (place / "flow").is_symlink()
    assert sorted(path.name for path in (tmp_path / "other_disk").iterdir()) == ["config.json", WEIGHTS]
    assert same_weights(TARFlowPipeline.from_pretrained(place), pipe)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_part_behind_a_link_to_a_real_second_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"tarflow-test-{os.getpid()}"
    other.mkdir()
    try:
        (tmp_path / "flow").symlink_to(other)
        small_pipeline().save_pretrained(tmp_path)
        pipe = small_pipeline(num_classes=4)
        pipe.save_pretrained(tmp_path)
        assert same_weights(TARFlowPipeline.from_pretrained(tmp_path), pipe)
        assert sorted(path.name for path in other.iterdir()) == ["config.json", WEIGHTS]
    finally:
        shutil.rmtree(other)


def test_a_mount_point(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom tarflow.pipeline.loading.folder import written_into\n"
        "for _ in range(2):\n with written_into('mount') as new: (new / 'a').write_text('b')\n"
        "print(sorted(p.name for p in Path('mount').iterdir()))"
    )
    (tmp_path / "mount").mkdir()
    python = shutil.which("python") and os.sys.executable
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none mount && exec "$0" -c "$1"', python, code]
    try:
        subprocess.run([*command[:4], "mount -t tmpfs none mount"], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no test mount anything")
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "['a']\n", done.stderr


@pytest.mark.parametrize("place", range(3))
def test_a_failing_rename_leaves_the_old_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    small_pipeline().save_pretrained(tmp_path / "pipeline", max_shard_size="100KB")
    before, calls, replace = files_of(tmp_path / "pipeline"), [], os.replace

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == place + 1:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", failing)
    with pytest.raises(OSError, match=r"cannot write .*Input/output error"):
        small_pipeline(num_classes=4).save_pretrained(tmp_path / "pipeline")
    assert files_of(tmp_path / "pipeline") == before


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("No space left on device (os error 28)")])
def test_a_full_disk_and_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path / "old")
    before = files_of(tmp_path / "old")

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(TARFlowModel, "save_pretrained", failing)
    for name in ("old", "new/deep"):
        with pytest.raises(OSError, match=r"cannot write .*No space left") as caught:
            pipe.save_pretrained(tmp_path / name)
        assert caught.value.errno == errno.ENOSPC
    assert files_of(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    error = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        pipe.save_pretrained(tmp_path / "old")
    assert files_of(tmp_path / "old") == before


def test_left_over_of_a_killed_process_is_removed_after_an_hour(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        left = tmp_path / f"{folder_module.TEMPORARY}{name}"
        left.mkdir()
        (left / "weights").write_text("x")
        for path in (left / "weights", left):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    with written_into(tmp_path) as new:
        (new / "a").write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{folder_module.TEMPORARY}new", "a"]


def test_rights_of_a_replaced_file_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    with written_into(tmp_path) as new:
        (new / "a").write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_new_files_may_be_read_by_others(tmp_path: Path) -> None:
    """As far as new files of this process may: safetensors makes weights that their owner alone may read."""
    pipe = small_pipeline()
    old = os.umask(0o022)
    try:
        pipe.save_pretrained(tmp_path / "pipeline")
        add_component(tmp_path / "pipeline", tmp_path / "more", "finetuned_decoder", pipe.flow)
    finally:
        os.umask(old)
    for folder in ("pipeline", "more"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert len(files) > 3 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_parts_whose_weights_are_elsewhere_are_not_saved(tmp_path: Path) -> None:
    pipe = small_pipeline(vae=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    before = files_of(tmp_path / "pipeline")
    pipe.vae.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "groups")
    )
    with pytest.raises(ValueError, match="weights of this AutoencoderKL are offloaded"):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert files_of(tmp_path / "pipeline") == before


def test_which_folders_are_unused(tmp_path: Path) -> None:
    assert is_unused(tmp_path / "new")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert is_unused(tmp_path)
    (tmp_path / "flow").mkdir()
    assert not is_unused(tmp_path)
    assert not is_unused(tmp_path / "README.md")


def test_a_component_goes_to_another_folder_and_leaves_what_is_there(tmp_path: Path) -> None:
    pipe = small_pipeline(vae=True)
    source, target = tmp_path / "source", tmp_path / "target"
    pipe.save_pretrained(source)
    for folder in (source, target):
        (folder / ".git").mkdir(parents=True)
        (folder / ".git" / "HEAD").write_text(folder.name)
    (source / "README.md").write_text("source's")
    (source / "examples.json").write_text("[]")
    (target / "README.md").write_text("target's")
    before = files_of(source)
    folder_module.add_component(source, target, "finetuned_decoder", LatentDecoder.from_autoencoder(pipe.vae))
    assert files_of(source) == before
    assert (target / "README.md").read_text() == "target's"
    assert (target / ".git" / "HEAD").read_text() == "target"
    assert (target / "examples.json").read_text() == "[]"
    loaded = TARFlowPipeline.from_pretrained(target)
    assert loaded.finetuned_decoder is not None
    assert same_weights(loaded, pipe)
    (target / "finetuned_decoder" / "notes.txt").write_text("mine")
    folder_module.add_component(target, target, "finetuned_decoder", LatentDecoder.from_autoencoder(pipe.vae))
    assert (target / "finetuned_decoder" / "notes.txt").read_text() == "mine"


def test_diffusers_own_class_loads_a_saved_folder(tmp_path: Path) -> None:
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["_class_name"] == ["pipeline", "TARFlowPipeline"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is TARFlowPipeline
    assert same_weights(loaded, pipe)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again").keys() == {INDEX, "pipeline.py", "flow/config.json", f"flow/{WEIGHTS}"}
    assert same_weights(TARFlowPipeline.from_pretrained(tmp_path / "again"), pipe)


def test_folders_of_before_load_and_others_code_stays(tmp_path: Path) -> None:
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, "_class_name": "TARFlowPipeline"}))
    (tmp_path / "pipeline.py").unlink()
    assert same_weights(TARFlowPipeline.from_pretrained(tmp_path), pipe)
    (tmp_path / "pipeline.py").write_text("# mine")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_text() == "# mine"
    assert json.loads((tmp_path / INDEX).read_text())["_class_name"] == "TARFlowPipeline"


class FakeHub:
    """What is uploaded and fetched, instead of a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str] | None = None):
        self.names, self.calls, self.uploaded = names or [], [], {}
        for module in (hub, diffusers.utils.hub_utils):
            monkeypatch.setattr(module, "create_repo", self.create_repo)
            monkeypatch.setattr(module, "load_or_create_model_card", self.card)
        monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", self.upload_folder)
        monkeypatch.setattr(hub, "list_repo_files", lambda *_, **__: self.names)
        monkeypatch.setattr(hub, "snapshot_download", self.fetch)

    def create_repo(self, repo_id: str, **options):
        self.calls.append(("create", repo_id, options))
        return type("Repo", (), {"repo_id": f"me/{repo_id.split('/')[-1]}"})()

    def card(self, *_, **__):
        from huggingface_hub import ModelCard

        return ModelCard("---\nlibrary_name: diffusers\n---\na new card")

    def upload_folder(self, repo_id: str, folder_path: str, **options):
        self.calls.append(("upload", repo_id, options))
        self.uploaded = files_of(Path(folder_path))

    def fetch(self, name: str, **options):
        self.calls.append(("fetch", name, options))
        return "folder"


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, pipe = FakeHub(monkeypatch), small_pipeline()
    pipe.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, token="secret", commit_message="first")
    create, upload = fake.calls
    assert create == ("create", "mine", {"exist_ok": True, "private": True, "token": "secret"})
    assert upload[1] == "me/mine"
    assert upload[2]["token"] == "secret"
    assert upload[2]["commit_message"] == "first"
    expected = {INDEX, "pipeline.py", "flow/config.json", f"flow/{WEIGHTS}", "README.md"}
    assert fake.uploaded.keys() == expected
    assert "a new card" in (tmp_path / "mine" / "README.md").read_text()
    (tmp_path / "mine" / "README.md").write_text("my card")
    pipe.save_pretrained(str(tmp_path / "mine"), push_to_hub=True, repo_id="me/other")
    assert fake.calls[-1][1] == "me/other"
    assert fake.uploaded["README.md"] == b"my card"
    fake.calls.clear()
    pipe.push_to_hub("me/third", variant="fp16")
    assert [call[1] for call in fake.calls] == ["me/third", "me/third"]
    assert fake.uploaded.keys() == {INDEX, "pipeline.py", "flow/config.json", f"flow/{WEIGHTS}", "README.md"} - {
        f"flow/{WEIGHTS}"
    } | {"flow/diffusion_pytorch_model.fp16.safetensors"}


REPOSITORY = [
    ".gitattributes",
    "README.md",
    INDEX,
    "decoding.json",
    "samples/1.png",
    "checkpoints/1/optimizer.bin",
    "flow/config.json",
    f"flow/{WEIGHTS}",
    "flow/diffusion_pytorch_model.bin",
    "flow/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "flow/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "flow/diffusion_pytorch_model.safetensors.index.fp16.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/tf_model.h5",
    "tokenizer/tokenizer.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
]
TEXTS = {
    "README.md",
    INDEX,
    "decoding.json",
    "flow/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {f"flow/{WEIGHTS}", "text_encoder/model.safetensors", "vae/config.json", REPOSITORY[-1]}),
        (
            {"variant": "fp16"},
            {*REPOSITORY[9:12], "text_encoder/model.safetensors", "vae/config.json", REPOSITORY[-1]},
        ),
        ({"use_safetensors": True, "vae": None}, {f"flow/{WEIGHTS}", "text_encoder/model.safetensors"}),
    ],
)
def test_only_what_is_read_is_fetched(monkeypatch: pytest.MonkeyPatch, options: dict, weights: set[str]) -> None:
    fake = FakeHub(monkeypatch, REPOSITORY)
    assert TARFlowPipeline.download("me/mine", revision="v1", force_download=True, **options) == "folder"
    ((_, name, call),) = fake.calls
    assert name == "me/mine"
    assert set(call.pop("allow_patterns")) == TEXTS | weights
    assert call == {"revision": "v1", "force_download": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "int8"}, "no weights of the variant 'int8'; variants are: 'fp16'"),
        ({"use_safetensors": True}, "the component 'vae' has no weights in the format 'safetensors'"),
        ({"use_safetensors": False}, "the component 'text_encoder' has no weights in the format 'bin'"),
    ],
)
def test_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch, options: dict, message: str) -> None:
    FakeHub(monkeypatch, REPOSITORY)
    with pytest.raises(ValueError, match=message):
        TARFlowPipeline.download("me/mine", **options)


def test_without_a_network_what_was_fetched_before_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch)

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "list_repo_files", offline)
    assert TARFlowPipeline.download("me/mine") == "folder"
    assert fake.calls == [("fetch", "me/mine", {"local_files_only": True})]

    def nothing(*_, **__):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(hub, "snapshot_download", nothing)
    with pytest.raises(ConnectionError, match="no network"):
        TARFlowPipeline.download("me/mine")
