"""Systems of a few megabytes: this host's kernel, and an initramfs with busybox and what else is wanted."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_XZ = b"\xfd7zXZ\x00"
_ELF = b"\x7fELF"


def kernel() -> Path:
    """This host's newest kernel."""
    return max(Path("/boot").glob("vmlinuz-*"))


def unpacked_kernel(to: Path) -> Path:
    """That kernel as an ELF file, which QEMU starts without unpacking it under emulation: half of a boot.

    to: the file that is written. Where the kernel is not packed by xz, it is returned as it is.
    """
    packed = kernel().read_bytes()
    for found in re.finditer(re.escape(_XZ), packed):
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed[found.start() :])
        if unpacked.startswith(_ELF):
            to.write_bytes(unpacked)
            return to
    return kernel()


def make(directory: Path, init: str, modules: Sequence[str], programs: Sequence[Path] = ()) -> Path:
    """An initramfs, made in an empty directory. Returns its file.

    init: a script of busybox's shell. modules: of that kernel, put into /modules with what they need, in the
    order in which they can be loaded. programs: of this host, put where they are here, with their libraries.
    """
    root = directory / "root"
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    busybox = root / "bin" / "busybox"
    busybox.write_bytes(Path("/bin/busybox").read_bytes())
    busybox.chmod(0o755)
    for number, module in enumerate(_with_dependencies(modules)):
        (root / "modules" / f"{number:02d}.ko").write_bytes(module.read_bytes())
    for program in programs:
        for file in (program, *_libraries(program)):
            place = root / file.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    initramfs = directory / "initramfs"
    listed = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    with initramfs.open("wb") as output:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"],
            input=listed.encode(),
            stdout=output,
            cwd=root,
            check=True,
        )
    return initramfs


def _with_dependencies(modules: Sequence[str]) -> list[Path]:
    release = kernel().name.removeprefix("vmlinuz-")
    found: dict[Path, None] = {}
    for name in modules:
        listed = subprocess.run(
            ["modprobe", "--set-version", release, "--show-depends", name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found |= {Path(line.split()[1]): None for line in listed.splitlines() if line.startswith("insmod")}
    return list(found)


def _libraries(program: Path) -> list[Path]:
    """What a program is linked with (ldd(1)), the loader too."""
    listed = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listed)]
