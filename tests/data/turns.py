"""Messages and a row that many tests of rows use."""

from __future__ import annotations


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return said("user", content)


def assistant(content: str) -> dict[str, str]:
    return said("assistant", content)


GOOD_ROW = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
QUESTION, YES, NO = user("Is it?"), assistant("Yes."), assistant("No.")
