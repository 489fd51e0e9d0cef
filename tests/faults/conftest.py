"""What the tests of faults share: the matrix and its table, short or full, runs that can be struck."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from .matrix import Matrix
from .runs import Workshop

_MATRIX = pytest.StashKey[Matrix]()


def pytest_configure(config: pytest.Config) -> None:
    """The markers of what only `make faults` tries, and of tests that are one try each."""
    config.addinivalue_line("markers", "full: a fault that is tried with --full only")
    config.addinivalue_line("markers", "fault(row, name): the test is one try of a fault; survived when it passes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `make faults` tries."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Enters tests with the marker `fault` into the matrix."""
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and report.when == "call" and not report.skipped:
        item.config.stash.setdefault(_MATRIX, Matrix()).add(*marker.args, 1, int(report.passed))
    return report


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Matrix:
    """The session's fault matrix."""
    return request.config.stash.setdefault(_MATRIX, Matrix())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Workshop]:
    """Where runs are begun, struck and begun again."""
    made = Workshop(model_folder, tmp_path_factory.mktemp("workshop"))
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the table as Markdown, and writes it where `--table` says."""
    table = config.stash.get(_MATRIX, Matrix()).markdown()
    if table:
        terminalreporter.section("faults")
        terminalreporter.write(table)
    if config.getoption("--table"):
        Path(config.getoption("--table")).write_text(table, encoding="utf-8")
