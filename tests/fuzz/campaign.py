"""Runs many cases of an area in several processes, counts outcomes, and minimises each kind of finding."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .choices import smaller
from .outcomes import Finding
from .processes import CLOCK_SECONDS, PROCESSOR_SECONDS, Report, Worker

KINDS = ("compared", "accepted", "refused", "void", "crash", "hang")


@dataclass
class Found:
    """A kind of finding: the first case with it, the smallest one, and the number of cases."""

    finding: Finding
    first: Report
    smallest: Report
    count: int = 1

    def text(self) -> str:
        replay = f"seed {self.first.seed}, choices {','.join(map(str, self.smallest.choices)) or '0'}"
        return (
            f"{self.finding.signature}\n  {self.finding.detail}\n  {self.count} times, {replay}\n{self.smallest.source}"
        )


@dataclass
class Campaign:
    """The result of many cases."""

    area: str
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    found: dict[str, Found] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(sum(counter.values()) for counter in self.counts.values())

    def summary(self, seconds: float) -> str:
        kinds = Counter(found.finding.kind for found in self.found.values())
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing found"
        return f"{self.area}: {self.total} cases in {seconds:.0f} s: {said}"

    def table(self) -> str:
        """Formats how often each function was called, with which outcomes."""
        rows = [("", "calls", *KINDS)]
        totals: Counter[str] = Counter()
        for function, counter in sorted(self.counts.items()):
            rows.append((function, str(sum(counter.values())), *(str(counter[kind] or "") for kind in KINDS)))
            totals.update(counter)
        rows.append(("all", str(self.total), *(str(totals[kind] or "") for kind in KINDS)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )


def run(
    area: str,
    seeds: Iterable[int | str],
    processes: int = 2,
    seconds: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
    minimise: bool = True,
    only: Sequence[str] | None = None,
    processor_seconds: float = PROCESSOR_SECONDS,
    clock_seconds: float = CLOCK_SECONDS,
    costly_tries: int = 25,
) -> Campaign:
    """Runs the cases of all seeds, or those that start within ``seconds``.

    ``only``: kinds of findings to report. ``processor_seconds``, ``clock_seconds``: limits after which a case is
    stopped. ``costly_tries``: attempts to minimise a case that takes seconds or a new process.
    """
    campaign, lock = Campaign(area), threading.Lock()
    source, end = iter(seeds), None if seconds is None else time.monotonic() + seconds
    failures: list[BaseException] = []

    def work() -> None:
        with Worker(area, folder, processor_seconds, clock_seconds) as worker:
            while end is None or time.monotonic() < end:
                with lock:
                    seed = next(source, None)
                if seed is None or failures:
                    return
                report = worker.run(seed)
                report.findings = [f for f in report.findings if only is None or f.kind in only]
                with lock:
                    campaign.counts[report.function][report.kind] += 1
                    new = [f for f in report.findings if f.signature not in campaign.found]
                    for finding in report.findings:
                        if finding in new:
                            campaign.found[finding.signature] = Found(finding, report, report)
                        else:
                            campaign.found[finding.signature].count += 1
                for finding in new:
                    found = campaign.found[finding.signature]
                    if minimise:
                        found.smallest, found.finding = smallest(worker, report, finding, costly_tries)
                    tell(found.text())

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        threads = [threading.Thread(target=guarded) for _ in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return campaign


def smallest(worker: Worker, report: Report, finding: Finding, costly_tries: int) -> tuple[Report, Finding]:
    """Minimises a case; returns the smallest one whose finding has the same signature."""
    best, best_finding = report, finding

    def fails(choices: list[int]) -> bool:
        nonlocal best, best_finding
        again = worker.run(choices=choices)
        same = next((f for f in again.findings if f.signature == finding.signature), None)
        if same is not None:
            again.seed = report.seed
            best, best_finding = again, same
        return same is not None

    before = worker.processor_seconds, worker.clock_seconds
    # A smaller case can hang even if this one does not.
    worker.processor_seconds, worker.clock_seconds = (min(*pair) for pair in zip(before, (10.0, 20.0), strict=True))
    is_costly = finding.kind in ("crash", "hang", "slow", "memory")
    smaller(report.choices, fails, tries=costly_tries if is_costly else 250)
    worker.processor_seconds, worker.clock_seconds = before
    return best, best_finding
