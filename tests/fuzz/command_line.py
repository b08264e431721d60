"""The command line as a target: any options and arguments end in an exit code and a sentence, never in a traceback."""

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

from typer.testing import CliRunner

from grood_edge.cli import app
from grood_edge.runtime.selftest import MODEL
from tests.fuzz.data import images, npz_files
from tests.fuzz.guard import Target
from tests.fuzz.mutations import mutate_text
from tests.golden import golden

CODES = (0, 1, 2, 3, 4)
OPTIONS = """
inspect
verify --backend --provider --i-trust-this-engine
score --out --alpha --batch-size --explain --backend --provider --threads --force --allow-unreadable
calibrate --data --out --alpha --delta --labels --episodes --fps --threshold-only --rule --per-class --threads
evaluate --id --ood --report --alpha --corrupt --baselines --fit --threads
bench --baseline --batch --seconds --threads --backend --provider
export --data --out --calibration-data --preprocess --input-size --resize --crop --filter --mean --std --camera-size
export --layout --classes --labels --features --ood-prototype --mixup-layer --scale --bank --precision --keep-float
export --seed --max-auroc-drop --max-flips --alpha --delta --data --out
compile --backend --batch --sm --out --check --force
watch --decision --policy --max-age --topic --fps --log --mcap --on-unknown --metrics --alpha --threads --record
"""
COMMANDS = [tuple(line.split()) for line in OPTIONS.strip().splitlines()]
PLAIN = """
digits.onnx golden.onnx broken.onnx images images/0.png images/*.png images.npz broken.npz missing . rows.jsonl rows.csv
rows.txt no/such/folder/x.onnx out.onnx 224 224x320 0x0 -1 0 1 nan inf 1e400 0.5 0.05 2 0.1,0.2,0.3 0.1,nan 1,1,8 8,1
99999999999999999999 auto all none mean mixup,noise images: images:images per-frame hysteresis hysteresis:on=3
hysteresis:on=x e-cusum e-cusum:mean-hours=0 newest drop-oldest:0 drop-oldest:9 every cpu cuda onnxruntime tensorrt
center rgb bilinear imagenet fp16 int8 3% -3% % save: save:alarms :0 :70000 nowhere:x [::1 replay:images replay: v4l2:
http://localhost:1/x v4l2:///dev/null /dev/null --json --help --version -- - [0-9 ~ $HOME %s * ** images/[
"""
VALUES = (*PLAIN.split(), "", "a ! b", "0" * 64, "x" * 5000, "a\nb", "\ud83d", "\udcff")


def arguments(folder: Path) -> Sequence[bytes]:
    good = [
        "inspect golden.onnx --json",
        "verify digits.onnx",
        "score digits.onnx images --out rows.jsonl",
        "watch digits.onnx images",
    ]
    return [b"\0".join(word.encode() for word in line.split()) for line in good]


def mutate_arguments(random: Random, data: bytes) -> bytes:
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    kind, at = random.randrange(6), random.randint(0, len(words))
    known = [options for name, *options in COMMANDS if words[:1] == [name]]
    options = (random.choice(known) if known else []) or ["--json"]
    if kind == 0:
        command, *options = random.choice(COMMANDS)
        words = [command, *random.choices(VALUES, k=random.choice((1, 2)))]
    if kind <= 2:
        for option in random.sample(options, min(len(options), random.choice((1, 1, 2, 4)))):
            words += [option, random.choice(VALUES)]
    elif kind == 3:
        words[at : at + 1] = [random.choice(VALUES)]
    elif kind == 4:
        del words[at : at + 1]
    elif words:
        words[at % len(words)] = mutate_text(random, words[at % len(words)])
    # module:factory is code, and a file that the user names is read: both are meant
    meant = [word for word in words if (":" not in word or word in VALUES) and "/etc/passwd" not in word]
    clean = [word.replace("\0", "") for word in meant]
    return b"\0".join(word.encode("utf-8", "surrogateescape" if _escaped(word) else "replace") for word in clean)


def _escaped(word: str) -> bool:
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in word)


@cache
def _files() -> tuple[bytes, bytes, tuple[bytes, ...], bytes]:
    return MODEL.read_bytes(), golden(), tuple(images(Path())[:4]), npz_files(Path())[0]


def run_command(data: bytes) -> None:
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    for entry in Path().iterdir():  # what earlier commands left
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    digits, small, pictures, archive = _files()
    Path("images").mkdir()
    for index, picture in enumerate(pictures):
        Path(f"images/{index}.png").write_bytes(picture)
    for name, content in {
        "digits.onnx": digits, "golden.onnx": small, "broken.onnx": digits[:5000], "images.npz": archive,
        "broken.npz": archive[:700],
    }.items():  # fmt: skip
        Path(name).write_bytes(content)
    found = CliRunner().invoke(app, words)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    if found.exit_code not in CODES:
        raise AssertionError(f"exit code {found.exit_code}")


TARGETS = (Target("command-line", arguments, mutate_arguments, run_command, memory=900, seconds=60, quick=12),)
