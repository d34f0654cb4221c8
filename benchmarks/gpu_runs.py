"""Checks of whole trainings on a GPU, most of them in processes of their own. As of `tarflow.benchmarks.gpu_checks`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

from tarflow import configs
from tarflow.benchmarks.gpu_checks import LeftOutError, Task, free_memory, require
from tarflow.data.drawings import random_drawing, render
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trainer import flow_trainer

RUN = ["--config", configs.resolve("quickstart_class"), "--log.trackers", "[]", "--log.eval_images", "32"]
SHARDED = str(configs.FOLDER / "accelerate" / "fsdp2.yaml")
#: Where a clone may be, as the package has no tests: around it, or where this is run.
TESTS = (Path(__file__).resolve().parents[1] / "tests", Path("tests").resolve())
#: Images per second of training the emoji flow that are wanted on a GPU.
EMOJI_TARGET = 15_000
#: Steps of each way.
EMOJI_STEPS = 200
#: Ways to train it, with their settings; what is to be fastest comes first.
EMOJI_WAYS: dict[str, dict[str, str]] = {
    "compiled, as graphs": {"--train.cuda_graphs": "true", "--train.compile": "true"},
    "as graphs": {"--train.cuda_graphs": "true"},
    "as usual": {},
}


def check_training(task: Task) -> dict[str, Any]:
    """A hundred steps of the class quick start: the likelihood improves, compiled and checkpointed as well."""
    count = 4 if task.small else 100
    results: dict[str, Any] = {}
    nats: list[float] = []
    runs: dict[str, tuple[int, list[str]]] = {"1 step": (1, []), f"{count} steps": (count, [])}
    runs[f"{count} steps, checkpointed"] = (count, ["--train.checkpointing", "both"])
    if not task.small:  # compiling alone takes longer than a small check should; "compiled-training" does it too
        runs[f"{count} steps, compiled"] = (count, ["--train.compile", "true"])
    with tempfile.TemporaryDirectory() as folder:
        for name, (steps, options) in runs.items():
            if len(nats) > 1 and task.over:
                break
            start = time.perf_counter()
            nats.append(nats_after(steps, f"{folder}/run", options))
            results |= {f"nats after {name}": nats[-1], f"seconds for {name}": time.perf_counter() - start}
            task.tell(results)
    require(all(later < nats[0] and abs(later - nats[1]) < 0.05 for later in nats[1:]), results)
    return results


def nats_after(steps: int, output: str, options: list[str]) -> float:
    """Held-out nats of so many steps of `RUN`. Of minutes there is no limit: it would lower the steps of a run that
    compiles first, whose likelihood is another then."""
    limits = ["--train.steps", str(steps), "--train.max_minutes", "null"]
    trainer = flow_trainer(*parse_config([*RUN, "--output", output, *limits, *options]))
    return trainer.run()["latent_nats_per_dim"]


def check_emoji(task: Task) -> dict[str, Any]:
    """Images per second of training the flow of the shipped emoji, of cached latents; of drawings if there is no archive
    of captioned pictures. On CUDA devices in all of `EMOJI_WAYS`, which must come to the same likelihood."""
    batch, workers = (8, 0) if task.small else (512, 8)
    with tempfile.TemporaryDirectory() as folder:
        archive, where = task.data, '{"style": ["twemoji", "noto", "fluent"]}'
        if archive is None:
            archive, where = f"{folder}/drawings.zip", "null"
            write_drawings(archive, 64 if task.small else 2048)
        pictures = ["--data.source", "folder", "--data.path", archive, "--data.image_size", "64", "--data.where", where]
        pictures += ["--data.caption_template", "{text}, {style} style", "--data.validation_fraction", "0.1"]
        cache = [sys.executable, "-m", "tarflow.cli", "cache-latents", "--output", f"{folder}/cache"]
        start = time.perf_counter()
        quietly([*cache, "--vae.name", "taef2", *pictures], task.deadline)
        results: dict[str, Any] = {"seconds to cache latents": time.perf_counter() - start}
        task.tell(results)
        run = {
            "--config": configs.resolve("emoji"),
            "--data.source": "latents",
            "--data.path": f"{folder}/cache",
            "--train.batch_size": str(batch),
            "--train.num_workers": str(workers),
            "--train.max_minutes": "null",
            "--train.steps": "3" if task.small else str(EMOJI_STEPS),
            "--flow.learned_denoiser": "none",
            "--optim.name": "muon",
            "--log.eval_images": "8" if task.small else "256",
            "--log.log_every": "1" if task.small else "20",
            "--log.trackers": "[]",
            **{f"--log.{name}_every": "0" for name in ("sample", "eval", "checkpoint")},
        }
        nats: list[float] = []
        ways = EMOJI_WAYS if task.device == "cuda" else {"as usual": EMOJI_WAYS["as usual"]}
        for name, settings in ways.items():
            if nats and task.over:
                break
            more = {"--output": f"{folder}/{name}", **settings}
            trainer = flow_trainer(*parse_config([part for pair in (run | more).items() for part in pair]))
            nats.append(trainer.run()["latent_nats_per_dim"])
            require(bool(trainer.speed), {"speed": "nothing was logged"})
            results |= {name: {"batch": batch, "nats": nats[-1], **trainer.speed}}
            task.tell(results)
            del trainer
            free_memory()
        require(max(nats) - min(nats) < 0.05, results)
    if not task.small:
        best = max(results[name]["images_per_second_later"] for name in EMOJI_WAYS if name in results)
        results[f"images per second of at least {EMOJI_TARGET:,}"] = best >= EMOJI_TARGET
    return results


def write_drawings(path: str, count: int) -> None:
    """An archive of drawings with captions, styles and keywords, in the shape of that of emoji."""
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for index in range(count):
            drawing, data = random_drawing(0, index), BytesIO()
            render(drawing).save(data, "PNG")
            archive.writestr(f"{index}.png", data.getvalue())
            rows.append(
                {"file_name": f"{index}.png", "text": drawing.caption, "style": "drawn", "keywords": drawing.shape}
            )
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def check_sharded_training(task: Task) -> dict[str, Any]:
    """FSDP2 over one process: a few steps, and a few more from the checkpoint."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SHARDED, "--num_processes", "1"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = [*RUN, "--output", f"{folder}/run", "--train.max_minutes", "null", "--log.checkpoint_every", "2"]
        for steps, more in ((2, []), (4, ["--resume", "latest"])):
            start = time.perf_counter()
            quietly([*launch, "-m", "tarflow.cli", "train", *run, "--train.steps", str(steps), *more], task.deadline)
            results[f"seconds for steps to {steps}"] = time.perf_counter() - start
            pipeline = Path(folder) / "run" / "pipeline" / "model_index.json"
            require(pipeline.is_file(), {"steps": steps, "pipeline": "none was saved"})
            task.tell(results)
    return results


def check_tests(task: Task) -> dict[str, Any]:
    """The tests of training, which then run on the device."""
    folder = next((one for one in TESTS if (one / "training" / "test_recipes.py").is_file()), None)
    if folder is None:
        raise LeftOutError("the tests are in the project's repository: run this in a clone")
    names = ["flows/test_likelihood.py"]
    if not task.small:
        names = ["training/test_recipes.py", "training/test_training.py", "flows/decoding/test_decoding.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / name) for name in names)]
    command += ["-k", "not bit_identical"]  # which a GPU does not promise
    if not task.small and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    output = quietly(command, task.deadline, TARFLOW_TEST_DEVICE=task.device)
    return {"pytest": output.strip().splitlines()[-1]}


def quietly(command: list[str], deadline: float, **environment: str) -> str:
    """What a command prints; a failure, or the deadline, is an error with the end of that."""
    environment = {**os.environ, "TQDM_DISABLE": "1", **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=max(1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            raise TimeoutError(f"its time was up; stdout: {output[-2000:]}; stderr: {errors[-2000:]}") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes would go on using the device
            raise
    require(process.returncode == 0, {"stdout": output[-2000:], "stderr": errors[-2000:]})
    return output
