"""The benchmark's tables: on the terminal, and between the marks of docs/benchmarks.md."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import peers
from tests.bench.results import EQUAL, OURS, Results

_MIB = 1 << 20
_TO_DISK = ("plan", "packages", "system", "disk")
"""The steps of ours that make the compressed disk; bundle, manifest and signature come after it."""


@dataclass(frozen=True)
class Rows:
    """A table. Every row has a cell for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_line, self.rows), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def publish(results: Results, document: Path) -> None:
    """Print the tables of bench.golden, and put them between the document's marks."""
    tables = (_cold_table(results), _figures_table(results), _steps_table(results), _machine_table(results))
    runs = len(results.of(OURS))
    said = f"Measured on {results.date}; medians of {runs}, in parentheses the least and the most."
    write(tables, said, document, "bench.golden")


def write(tables: Sequence[Rows], said: str, document: Path, mark: str) -> None:
    """Print tables, and put them between a document's marks. said: the sentence above them."""
    console = Console()
    for table in tables:
        console.print(table.rich())
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    written = "\n".join([begin, said, "", *(table.markdown() for table in tables), end])
    document.write_text(f"{before}{written}{after}", encoding="utf-8")


def _cold_table(results: Results) -> Rows:
    columns = ("builder", "seconds", "to the fastest peer", "image", "packages", "boots to")
    fastest = min(
        (results.median(one.name) for one in peers.PEERS if results.of(one.name)), default=float("nan")
    )
    rows = []
    for builder in (OURS, EQUAL, *(one.name for one in peers.PEERS)):
        runs = results.of(builder)
        if not runs:
            if builder in results.missing:
                install = f"not there: apt-get install --no-install-recommends {results.missing[builder]}"
                rows.append((builder, install, "", "", "", ""))
            continue
        rows.append(
            (
                builder,
                spread([one.seconds for one in runs]),
                f"{results.median(builder) / fastest:.2f}",
                f"{statistics.median(one.size for one in runs) / _MIB:.1f} MiB",
                str(len(results.packages.get(builder, ())) or "unknown"),
                results.boots.get(builder, "not looked at"),
            )
        )
    return Rows("Cold build, without verification", columns, tuple(rows))


def _figures_table(results: Results) -> Rows:
    whole = [one.whole_seconds or 0 for one in results.of(OURS)]
    theirs = [one for peer in peers.PEERS for one in results.of(peer.name)]
    fastest = min((results.median(one.name) for one in peers.PEERS if results.of(one.name)), default=0)
    smallest = min((one.size for one in theirs), default=0)
    size = statistics.median(one.size for one in results.of(OURS))
    disk = statistics.median(results.disk) / statistics.median(results.bare_disk)
    share = statistics.median(results.overlay) / results.median(OURS)
    whole_share = statistics.median(results.whole_overlay) / statistics.median(whole)
    downloads = f"{results.second_packages} bytes, {results.second_indices / _MIB:.1f} MiB of indices"
    to_disk = [sum(one.steps[title] for title in _TO_DISK) for one in results.of(OURS)]
    rows = [
        ("cold build up to the compressed disk, where the peers end", spread(to_disk), "", ""),
        ("from the finished tree to the compressed disk", spread(results.disk), "", ""),
        ("the same by mke2fs and qemu-img alone", spread(results.bare_disk), "", ""),
        ("ratio of these two", f"{disk:.2f}", "at most 1.5", met(disk <= 1.5)),
        (
            "cold build with verification",
            spread(whole),
            "under 90 s",
            met(statistics.median(whole) < 90),
        ),
        (
            "nothing changed",
            spread(results.unchanged),
            "under 2 s",
            met(statistics.median(results.unchanged) < 2),
        ),
        ("one overlay file changed, without verification", spread(results.overlay), "", ""),
        ("its share of the cold build without", f"{share:.2f}", "under 0.33", met(share < 1 / 3)),
        ("one overlay file changed, with verification", spread(results.whole_overlay), "", ""),
        (
            "its share of the cold build with",
            f"{whole_share:.2f}",
            "under 0.33",
            met(whole_share < 1 / 3),
        ),
        (
            "packages downloaded by a second build",
            downloads,
            "none",
            met(results.second_packages == 0),
        ),
        (
            "bundle of two builds with one SOURCE_DATE_EPOCH",
            "identical" if results.same_bundle else "differs",
            "identical",
            met(bool(results.same_bundle)),
        ),
        (
            "disk of two builds with one SOURCE_DATE_EPOCH",
            "identical" if results.same_disk else f"differs: {results.differing}",
            "",
            "",
        ),
        ("unpacking the system from its bundle, nothing else", spread(results.unpack), "", ""),
        (
            "files in the system",
            f"{results.tree_files}, {results.tree_bytes / _MIB:.0f} MiB",
            "",
            "",
        ),
    ]
    if theirs:
        ratio = results.median(OURS) / fastest
        rows.insert(0, ("cold build to the fastest peer's", f"{ratio:.2f}", "at most 1", met(ratio <= 1)))
        rows.insert(
            1,
            ("image to the smallest peer's", f"{size / smallest:.2f}", "at most 1", met(size <= smallest)),
        )
    return Rows("The figures to reach", ("figure", "measured", "wanted", "reached"), tuple(rows))


def _steps_table(results: Results) -> Rows:
    runs = results.of(OURS)
    rows = tuple(
        (
            title.replace("/", ": "),
            spread([one.steps[title] for one in runs if title in one.steps]),
        )
        for title in runs[0].steps
        if title.count("/") <= 1  # deeper names are files and mount points, which hold slashes
    )
    return Rows(f"Where {OURS}'s time goes in the cold build", ("step", "seconds"), rows)


def _machine_table(results: Results) -> Rows:
    rows = (*results.machine.items(), *results.versions.items())
    return Rows("Machine and versions", ("what", "value"), rows)


def circumstances() -> str:
    """When something was measured, and beside what, without an end: asked when all of it is over."""
    load = "/".join(f"{one:.1f}" for one in os.getloadavg()[:2])
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {os.cpu_count()} processors, whose load "
        f"over 1 and 5 minutes was {load} at the end"
    )


def spread(values: Sequence[float]) -> str:
    """The median of seconds, with the least and the most."""
    return f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})"


def met(reached: bool) -> str:
    """Whether a figure is what was wanted, as a cell."""
    return "yes" if reached else "no"
