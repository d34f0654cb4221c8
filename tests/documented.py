"""The commands that README and docs tell a reader to type, copied out of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from helpers import ROOT

from tarflow.cli.main import SCRIPTS

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").rglob("README.md"))]
#: Old commands are told as they were.
TEXTS.remove(ROOT / "docs" / "LOG.md")
#: What the scripts at the top are.
TOP = {
    "train_latent.py": ["train"],
    "train_student.py": ["train-student"],
    "evaluate_fid.py": ["evaluate", "fid"],
    "evaluate_bpd.py": ["evaluate", "likelihood"],
    "quickstart.py": ["train", "--config", "quickstart_text"],
}
#: What stands for "…" behind an option; elsewhere it is left out.
ANY = {"--data.source": "drawings", "--gen.data.path": "emoji.zip"}
ANY_CONFIG = {"train": "quickstart_text", "train-vae": "vae_emoji", "train-student": "student_drawings"}
#: What stands for variables that the reader is told to set.
VARIABLES = {
    "$EMOJI": "emoji.zip",
    "$NETTE": "nette.zip",
    "$X": "--extractor mobilenet_v2 --extractor-weights mobilenet_v2.safetensors",
    "$ddp": "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 -m",
}
OURS = re.compile(r"^(?:OMP_NUM_THREADS=\d+ )?(?:exec )?(tarflow|python3?|accelerate launch|\.venv/bin/\w+)\b")
#: Scripts without a command, which have tests of their own.
TOOLS = re.compile(rf"tarflow\.scripts\.({'|'.join(SCRIPTS)})\b")
PIP = re.compile(r"\bpip (install|download|list)\b")
LAUNCHER = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
)


def shell_lines(text: str, kinds: Sequence[str] = ("bash", "sh", "console", "")) -> Iterator[str]:
    """Lines of a text's blocks of these kinds, those that go on in the next line joined, without comments."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind in kinds:
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                yield re.sub(r"(?:^|\s+)#.*", "", line).removeprefix("$ ").strip()


def shell_functions(lines: Iterable[str]) -> dict[str, str]:
    """Functions of one command that are defined among lines, with their commands."""
    found, name = {}, ""
    for line in lines:
        if opened := re.fullmatch(r"(\w+)\(\) \{", line):
            name = opened[1]
        elif line == "}":
            name = ""
        elif name:
            found[name] = line
    return found


def block_commands(file: Path) -> list[str]:
    """Commands of this project in a text's blocks, with the variables and functions that are defined there."""
    lines = list(shell_lines(file.read_text(encoding="utf-8")))
    functions = shell_functions(lines)
    variables, found = dict(VARIABLES), []
    for line in lines:
        if set_here := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[f"${set_here[1]}"] = VARIABLES.get(f"${set_here[1]}", set_here[2])
            continue
        if line in functions.values():
            continue
        line = called(line, functions)
        for name, value in variables.items():
            line = re.sub(re.escape(name) + r"\b", lambda _, value=value: value, line)
        if OURS.match(line) and "-c " not in line and not PIP.search(line) and not TOOLS.search(line):
            found.append(line)
    return found


def other_lines(lines: Sequence[str]) -> list[str]:
    """Lines that are neither commands of this project nor make one: functions, variables and code in quotation marks."""
    functions, found, quoted = shell_functions(lines), [], False
    for line in lines:
        inside, quoted = quoted, quoted != (line.count('"') % 2 == 1 or line.count("'") % 2 == 1)
        made = line == "}" or line in functions.values() or re.match(r"\w+\(\) \{|\w+=", line)
        if not (inside or made or OURS.match(line) or line.startswith("$") or line.split(" ")[0] in functions):
            found.append(line)
    return found


def called(line: str, functions: dict[str, str]) -> str:
    """A line that calls one of the functions as the command that it is."""
    name, _, arguments = line.partition(" ")
    return functions[name].replace('"$@"', arguments) if name in functions else line


def inline_commands(file: Path) -> list[str]:
    """Commands inside of a text's sentences, which may be fragments."""
    text = file.read_text(encoding="utf-8")
    functions = shell_functions(shell_lines(text))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [" ".join(command.split()) for command in re.findall(r"`([^`]+)`", text)]
    found = [called(command, functions) if " --" in command else command for command in found]
    return [command for command in found if OURS.match(command) and " -c " not in command and not PIP.search(command)]


def words_of(command: str) -> list[str]:
    """The words of `tarflow` for a command, whichever way it is called; empty for what is none of its commands."""
    words = shlex.split(OURS.sub(r"\1", command))
    if words[0] == "accelerate":
        words = words[2:]
        while words and words[0] in (*LAUNCHER, "--cpu", "…"):
            words = words[2 if words[0] in LAUNCHER else 1 :]
    elif words[0] != "tarflow":
        words = words[1:]
    if words and words[0] == "-m":
        words = words[1:]
    if not words:
        return []
    first, rest = words[0], words[1:]
    if first in ("tarflow", "tarflow.cli"):
        return rest
    if first in TOP:
        return TOP[first] + rest
    if script := re.fullmatch(r"(?:scripts/(\w+)\.py|tarflow\.scripts\.(\w+))", first):
        door = ROOT / "scripts" / f"{script[1] or script[2]}.py"
        name = re.search(r"The command `tarflow ([\w-]+)`", door.read_text(encoding="utf-8"))
        return [name[1], *rest] if name else []
    return []


def filled_in(words: list[str]) -> list[str]:
    """Words with something for each "…"."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        if word != "…":
            found.append(word.replace("tests/reference/*/", str(ROOT / "tests" / "reference" / "starflow_text")))
        elif before == "--config":
            found.append(ANY_CONFIG.get(words[0], "decoder"))
        elif before.startswith("--"):
            found.append(ANY[before])
    return found


ALL = [(file, command) for file in TEXTS for command in block_commands(file)]
FRAGMENTS = [(file, command) for file in TEXTS for command in inline_commands(file)]
#: Those in sentences that are commands as they stand.
WHOLE = [
    (file, command)
    for file, command in FRAGMENTS
    if " --" in command and not re.search(r"…|[$]|(?<![\w-])[A-Z]{4,}\b", command)
]


def named(case: tuple[Path, str]) -> str:
    return f"{case[0].relative_to(ROOT)}: {case[1][:80]}"
