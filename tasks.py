"""The tasks of a checkout: the users' (see vdibuild/tasks), and the developers'."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import task

from vdibuild.tasks import namespace as ns

_ROOT = Path(__file__).parent


def _run(context: Context, module: str, *arguments: str) -> None:
    """Run a module of the virtual environment in the project's directory."""
    with context.cd(_ROOT):
        context.run(shlex.join([sys.executable, "-m", module, *arguments]))


@task
def lint(context: Context) -> None:
    """Check style and types."""
    _run(context, "ruff", "check", "--quiet")
    _run(context, "ruff", "format", "--check", "--quiet")
    _run(context, "mypy", "--no-error-summary")


@task(pre=[lint], help={"unit": "only what needs neither root nor guests", "select": "only tests that match"})
def test(context: Context, unit: bool = False, select: str = "") -> None:
    """Check style and types, then run every test."""
    chosen = ["tests/unit"] if unit else ["tests/unit", "tests/guest"]
    # A guest keeps one processor busy; more than four of them would want much memory.
    side_by_side = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    _run(context, "pytest", *chosen, *side_by_side, *(["-k", select] if select else []))


@task(help={"runs": "how often each thing is measured"})
def bench_golden(context: Context, runs: int = 3) -> None:
    """Measure golden builds beside mkosi, vmdb2, debos."""
    _run(context, "tests.bench.golden", "--runs", str(runs))


@task(help={"files": "how many there are", "runs": "how often each thing is measured"})
def bench_files(context: Context, files: int = 1_000_000, runs: int = 1) -> None:
    """Measure bundling and unpacking a million tiny files beside tar and mke2fs."""
    _run(context, "tests.bench.files", "--files", str(files), "--runs", str(runs))


@task(help={"runs": "how often the installation is measured"})
def bench_install(context: Context, runs: int = 3) -> None:
    """Measure an installation, and what its driver adds."""
    _run(context, "tests.bench.install", "--runs", str(runs))


@task(help={"builds": "how often both are built", "runs": "how often all else is measured"})
def bench_kiosk(context: Context, builds: int = 1, runs: int = 3) -> None:
    """Measure the kiosk beside live-build's, its ISO beside xorriso's, its cards beside dd's."""
    _run(context, "tests.bench.kiosk", "--builds", str(builds), "--runs", str(runs))


@task(help={"part": "signals, relay, refill or rivals: only that", "image": "of refill's machines"})
def bench_pool(context: Context, part: str = "", image: str = "") -> None:
    """Measure stations' waiting, the relay, the next clean machine, and the pool beside shell scripts."""
    only = ["--part", part] if part else []
    _run(context, "tests.bench.pool", *only, *(["--image", image] if image else []))


@task(help={"image": "an image that has a version", "runs": "how often each thing is measured"})
def bench_provision(context: Context, image: str, runs: int = 9) -> None:
    """Measure provision and shrink beside cp, tar, a shell script and libguestfs's tools."""
    _run(context, "tests.bench.provision", image, "--runs", str(runs))


ns.add_task(lint)
ns.add_task(test)
_bench = Collection("bench")
_bench.add_task(bench_files, "files")
_bench.add_task(bench_golden, "golden")
_bench.add_task(bench_install, "install")
_bench.add_task(bench_kiosk, "kiosk")
_bench.add_task(bench_pool, "pool")
_bench.add_task(bench_provision, "provision")
ns.add_collection(_bench)
