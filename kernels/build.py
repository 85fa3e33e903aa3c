"""Builds the CUDA kernels into one shared library with a C interface; needs nvcc (12.0 or later), no GPU, no PyTorch.

    python kernels/build.py                      # mka_megatron/ops/_lib/libmka.so for sm_80 and sm_90a
    python kernels/build.py --out /tmp/libmka.so --arch 90a

Every source is compiled into an object that is kept by the hash of what it was made from (build/kernels), so only what
changed is compiled again. The library carries the hash of all sources; a file of the same name ending in .json beside
it has that hash, the targets and each kernel's resources. A kernel that spills registers or has a stack frame fails
the build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "mka_megatron" / "ops" / "_lib" / "libmka.so"
CACHE = HERE.parent / "build" / "kernels"
TARGETS = ("80", "90a")
FLAGS = (
    "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC",
    "-Xcompiler", "-fvisibility=hidden", "-Xcompiler", "-Wall", "-cudart", "static",
)  # fmt: skip
# what a Hopper kernel is made for, by the low 9 bits of the machine instruction
INSTRUCTIONS = {0x1F0: "HGMMA", 0x1B4: "UTMALDG"}
_SLOW = re.compile(r"^.*(?:\(C7508\)|Potential Performance Loss).*$", re.MULTILINE)
_HAS = re.compile(r"^mka: '([\w$.]+)' for 'sm_(\w+)' has ([\w ]+)$", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_KERNEL = re.compile(
    r"(?:Compiling entry function|Function properties for) '?([\w$.]+)'?(?: for 'sm_(\w+)')?|"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads|"
    r"Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


class BuildError(Exception):
    """A sentence for the person who builds."""


@dataclass
class Kernel:
    """What ptxas says of one function for one target."""

    name: str
    target: str
    stack: int = 0
    """Bytes of its stack frame; 0 is asked for, as of spills."""
    spills: int = 0
    """Bytes that are stored and loaded."""
    registers: int = 0
    """0 for a function that is no kernel."""
    shared: int = 0
    """Static bytes."""
    instructions: tuple[str, ...] = ()
    """Which of INSTRUCTIONS it has."""


def sources(folder: Path = HERE) -> list[Path]:
    """All that the library is made from, in a fixed order."""
    return [
        folder / "c_api.h",
        *sorted((folder / "include" / "mka").glob("*.cuh")),
        *sorted((folder / "csrc").glob("*.cu")),
    ]


def source_hash(folder: Path = HERE) -> str:
    """sha256 over the sources' names and contents and the compiler's flags."""
    return _digest(sources(folder), folder, *FLAGS)


def find_nvcc() -> str | None:
    """nvcc on the path or where the toolkit's installer puts it."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def build(
    out: Path = OUT,
    *,
    targets: tuple[str, ...] = TARGETS,
    jobs: int | None = None,
    nvcc: str | None = None,
    cache: Path = CACHE,
    folder: Path = HERE,
) -> list[Kernel]:
    """Compiles and links `out`; what is up to date is left as it is.

    Args:
        out: the library.
        targets: compute capabilities, as in sm_<target>.
        jobs: compilers at a time; None: as many as processors.
        nvcc: the compiler; None: :func:`find_nvcc`.
        cache: where objects are kept.
        folder: where the sources are.

    Returns:
        the resources of every function for every target.

    Raises:
        BuildError: there is no nvcc or no source, the compiler fails, or a function is not as it should be.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc is not on the path: install the CUDA toolkit (12.0 or later) or give --nvcc.")
    files = sorted((folder / "csrc").glob("*.cu"))
    if not files:
        raise BuildError(f"{folder / 'csrc'} has no .cu file: build from a checkout of the repository.")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    whole = source_hash(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        made = list(pool.map(lambda file: _compile(nvcc, version, file, targets, cache, folder), files))
    kernels = [kernel for _, some in made for kernel in some]
    wrong = [k for k in kernels if k.stack or k.spills]
    if wrong:
        names = ", ".join(
            f"{k.name} (sm_{k.target}: {k.spills} bytes spilled, {k.stack} bytes of stack)" for k in wrong
        )
        raise BuildError(f"registers spill or a stack frame is used in {names}.")
    for file, (_, some) in zip(files, made, strict=True):
        for k in some if _for_hopper(file) else []:
            lacking = sorted(set(INSTRUCTIONS.values()) - set(k.instructions))
            if k.target == "90a" and k.registers and lacking:
                raise BuildError(f"{k.name} of {file.name} has no {' and no '.join(lacking)} for sm_90a.")
    about = {"source_hash": whole, "targets": list(targets), "nvcc": version.strip().splitlines()[-1]}
    record = json.dumps({**about, "kernels": [asdict(k) for k in kernels]}, indent=1) + "\n"
    beside = out.with_suffix(".json")
    if not (out.exists() and beside.exists() and beside.read_text(encoding="utf-8") == record):
        _link(nvcc, [at for at, _ in made], whole, out, cache)
        _write(beside, record)
    return kernels


def _compile(
    nvcc: str, version: str, file: Path, targets: tuple[str, ...], cache: Path, folder: Path
) -> tuple[Path, list[Kernel]]:
    inspected = ["instructions"] if _for_hopper(file) else []
    key = _digest([*_included(file, folder), file], folder, *FLAGS, *targets, version, *inspected)
    made, log = cache / f"{file.stem}-{key[:20]}.o", cache / f"{file.stem}-{key[:20]}.log"
    if not (made.exists() and log.exists()):
        part = made.with_suffix(f".{os.getpid()}.o")
        gencode = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
        include = [f"-I{folder}", f"-I{folder / 'include'}"]
        with tempfile.TemporaryDirectory(dir=cache) as kept:
            keep = ["-keep", "-keep-dir", kept] if inspected else []
            run = subprocess.run(
                [nvcc, *FLAGS, *gencode, *include, *keep, "-c", str(file), "-o", str(part)],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise BuildError(f"{file.name} does not compile:\n{run.stdout}{run.stderr}")
            has = [
                f"mka: '{name}' for 'sm_{_target(image, targets)}' has {' '.join(sorted(found))}\n"
                for image in sorted(Path(kept).glob("*.cubin"))
                for name, found in instructions(image.read_bytes()).items()
                if found
            ]
        _write(log, run.stdout + run.stderr + "".join(has))
        os.replace(part, made)
    text = log.read_text(encoding="utf-8")
    if slow := _SLOW.search(text):
        raise BuildError(f"{file.name}: {slow[0].strip()}")
    return made, resources(text)


def _for_hopper(file: Path) -> bool:
    return "_hopper" in file.stem


def _target(image: Path, targets: tuple[str, ...]) -> str:
    """Of a cubin that nvcc kept: its name says it where there are several."""
    named = re.search(r"\.(?:compute|sm)_(\w+)$", image.stem)
    return named[1] if named else targets[0]


def _link(nvcc: str, objects: list[Path], whole: str, out: Path, cache: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    baked = cache / f"version-{whole[:20]}-{os.getpid()}.cpp"
    part = out.with_suffix(f".{os.getpid()}.so")
    _write(
        baked,
        f'extern "C" __attribute__((visibility("default"))) const char* mka_source_hash() {{ return "{whole}"; }}\n',
    )
    try:
        command = [
            nvcc,
            "-shared",
            "-cudart",
            "static",
            "-Xcompiler",
            "-fPIC",
            "-Xlinker",
            "--exclude-libs,ALL",
        ]
        run = subprocess.run(
            [*command, str(baked), *map(str, objects), "-o", str(part)], capture_output=True, text=True
        )
        if run.returncode:
            raise BuildError(f"the library does not link:\n{run.stdout}{run.stderr}")
        os.replace(part, out)
    finally:
        baked.unlink()


def resources(log: str) -> list[Kernel]:
    """The functions of a `ptxas -v` report."""
    found: list[Kernel] = []
    target = ""
    for match in _KERNEL.finditer(log):
        name, arch, stack, stores, loads, registers, shared = match.groups()
        if name:
            target = arch or target
            if not found or (found[-1].name, found[-1].target) != (name, target):
                found.append(Kernel(name, target))
        elif stack:
            found[-1].stack, found[-1].spills = int(stack), int(stores) + int(loads)
        elif registers:
            found[-1].registers, found[-1].shared = int(registers), int(shared or 0)
    has = {(name, arch): tuple(which.split()) for name, arch, which in _HAS.findall(log)}
    for kernel in found:
        kernel.instructions = has.get((kernel.name, kernel.target), ())
    return found


def instructions(image: bytes) -> dict[str, set[str]]:
    """Which of INSTRUCTIONS each kernel of a cubin has (an ELF file of sections .text.<kernel>, 16 bytes an instruction)."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<3H", image, 0x3A)
    # (name, ..., offset, bytes) of each section
    sections = [struct.unpack_from("<II4Q", image, table + i * size) for i in range(count)]
    found: dict[str, set[str]] = {}
    for name, _, _, _, offset, length in sections:
        begin = sections[names][4] + name
        label = image[begin : image.index(0, begin)].decode()
        if label.startswith(".text."):
            words = struct.unpack_from(f"<{length // 8}Q", image, offset)[::2]
            found[label[6:]] = {INSTRUCTIONS[w & 0x1FF] for w in words if w & 0x1FF in INSTRUCTIONS}
    return found


def table(kernels: list[Kernel]) -> str:
    """A line for each function and target, with readable names where c++filt is there."""
    names = [k.name for k in kernels]
    tool = shutil.which("c++filt")
    if tool and names:
        run = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
        names = run.stdout.splitlines()
    rows = [
        f"sm_{k.target:<4} {k.registers:>4} registers {k.shared:>6} B shared  {name}"
        for k, name in zip(kernels, names, strict=True)
    ]
    return "\n".join(rows)


def _included(file: Path, folder: Path) -> list[Path]:
    """The project's headers that `file` includes, however deep, each once."""
    found: dict[Path, None] = {}
    todo = [file]
    while todo:
        for name in _INCLUDE.findall(todo.pop().read_text(encoding="utf-8")):
            at = next((d / name for d in (folder, folder / "include") if (d / name).exists()), None)
            if at is not None and at not in found:
                found[at] = None
                todo.append(at)
    return sorted(found)


def _digest(files: list[Path], folder: Path, *more: str) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    for each in more:
        digest.update(f"{each}\0".encode())
    return digest.hexdigest()


def _write(at: Path, text: str) -> None:
    part = at.with_name(f"{at.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, at)


def main() -> int:
    """0 when the library is there and every kernel is within its resources."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the library (default: %(default)s)")
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), help="targets (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: as many as processors)")
    parser.add_argument("--nvcc", help="the compiler (default: the one on the path)")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where objects are kept (default: %(default)s)"
    )
    parser.add_argument("--hash", action="store_true", help="print the hash of the sources and stop")
    args = parser.parse_args()
    if args.hash:
        print(source_hash())
        return 0
    try:
        kernels = build(args.out, targets=tuple(args.arch), jobs=args.jobs, nvcc=args.nvcc, cache=args.cache)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    print(table(kernels))
    print(f"{args.out}: {len(kernels)} functions, no spills, no stack frames; sources {source_hash()[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
