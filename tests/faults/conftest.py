"""What the tests of faults share: the matrix and its table, short or full, runs that can be struck."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .matrix import Matrix
from .runs import Workshop

_MATRIX = pytest.StashKey[Matrix]()


def pytest_configure(config: pytest.Config) -> None:
    """The marker of what only `make faults` tries."""
    config.addinivalue_line("markers", "full: a fault that is tried with --full only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `make faults` tries."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every fault is tried (`make faults`), or a few of each kind."""
    return bool(request.config.getoption("--full"))


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
