"""Rules that judge: Python functions of the user's own, loaded from a file and called with care."""

from __future__ import annotations

import hashlib
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from penchant.disk import sha256_of
from penchant.errors import UserError, nearest
from penchant.examples import Text


@dataclass(frozen=True)
class Rule:
    """A function `score(prompt, completions)` or `score(prompt, completions, row)`, where it stands, and a hash of its
    code."""

    function: Callable[..., Sequence[float]]
    name: str
    file: str
    sha256: str

    @cached_property
    def takes_row(self) -> bool:
        """Whether the function has a third parameter, for the row of the data that the prompt comes from."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return False
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return sum(one.kind in positional and one.default is one.empty for one in parameters) == 3

    def scores(
        self, prompt: Text, completions: Sequence[str], row: Mapping[str, Any] | None = None
    ) -> tuple[float, ...]:
        """What the function says of completions.

        Raises:
            UserError: it fails, or gives anything but one finite number for each, or wants a row and there is none.
        """
        if self.takes_row and row is None:
            raise self._trouble(None, "takes a row of the data as well, and here there is none", prompt)
        try:
            given = list(self.function(prompt, list(completions), *([dict(row or {})] if self.takes_row else [])))
        except Exception as error:
            raise self._trouble(error.__traceback__, f"fails with {_told(error)}", prompt) from error
        if len(given) != len(completions):
            raise self._trouble(None, f"gives {len(given)} numbers for {len(completions)} completions", prompt)
        scores = []
        for value in given:
            score = _number(value)
            if score is None:
                raise self._trouble(None, f"gives {reprlib.repr(value)}, which is no finite number", prompt)
            scores.append(score)
        return tuple(scores)

    def _trouble(self, trace: Any, what: str, prompt: Text) -> UserError:
        code = getattr(self.function, "__code__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == self.file]
        line = lines[-1] if lines else getattr(code, "co_firstlineno", None)
        place = self.file if line is None else f"{self.file}:{line}"
        return UserError(f"{place}: the rule {self.name} {what}, on the prompt {shortened(prompt)}; mend the rule.")


def given_rule(function: Callable[..., Sequence[float]]) -> Rule:
    """A ready function as a rule. Its hash is that of its source or, where there is none, of its name."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source, file = inspect.getsource(function), inspect.getfile(function)
    except (OSError, TypeError):  # made by exec, written in C, or an object that can be called
        source, file = name, getattr(function, "__module__", "") or "rule"
    return Rule(function, name, file, hashlib.sha256(f"{name}\n{source}".encode()).hexdigest())


def load_rule(place: str) -> Rule:
    """The function that `file.py:name` names. Its hash is that of the file and of what it imports from its folder.

    While the file is loaded it can import its neighbours; afterwards nothing of that is left behind.

    Raises:
        UserError: there is no such file or function, or the file fails.
    """
    file, _, name = place.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"judge.function: '{place}' names no function; give it as FILE.py:NAME.")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"judge.function: there is no file '{file}'.")
    module = ModuleType(f"penchant_rule_{path.stem}")
    module.__file__ = str(path)
    with _neighbours_of(module) as neighbours:
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise UserError(f"judge.function: {_where(error, path)} fails with {_told(error)}") from error
        files = [path, *sorted(neighbours())]
    function = getattr(module, name, None)
    if function is None:
        functions = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        raise UserError(f"judge.function: '{file}' has no function '{name}'{nearest(name, functions)}.")
    if not callable(function):
        raise UserError(f"judge.function: {name} in '{file}' is no function but {type(function).__name__}.")
    return Rule(function, name, str(path), hashlib.sha256("".join([name, *map(sha256_of, files)]).encode()).hexdigest())


@contextmanager
def _neighbours_of(module: ModuleType) -> Iterator[Callable[[], set[Path]]]:
    """Within it a module can import the files of its folder; gives a function that tells which it has imported."""
    folder = Path(str(module.__file__)).resolve().parent
    before = set(sys.modules)
    wrote_bytecode = sys.dont_write_bytecode

    def imported() -> dict[str, Path]:
        files = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
        found = {name: Path(file).resolve() for name, file in files.items() if file and name != module.__name__}
        return {name: path for name, path in found.items() if path.is_relative_to(folder)}

    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        yield lambda: set(imported().values())
    finally:
        for name in imported():  # another rule's neighbours may have the same names
            del sys.modules[name]
        sys.modules.pop(module.__name__, None)
        sys.dont_write_bytecode = wrote_bytecode
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def shortened(prompt: Text, limit: int = 60) -> str:
    """The beginning of a prompt (of its last message), in quotes, to name it in a message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _number(value: Any) -> float | None:
    """The value as a float if it is a finite number, NumPy's and PyTorch's included."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _where(error: BaseException, path: Path) -> str:
    """The line of a file at which an error came up."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _told(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
