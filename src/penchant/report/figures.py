"""Numbers as people read them, and the intervals that belong to shares."""

from __future__ import annotations

import math

MISSING = "–"

Number = int | float
"""A count, shown in full, or a measurement, shown with three digits."""


def number(value: Number | None) -> str:
    """Three significant digits, integers in full: 0.693, 12,345, 1e-5, and a dash for None.

    A value that was rounded keeps its zeros (0.0999 is 0.0999, 0.09996 is 0.100), one that is exact does not.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    sign = "−" if value < 0 else ""
    if isinstance(value, int):
        return f"{sign}{abs(value):,}"
    mantissa, exponent = f"{abs(value):.2e}".split("e")
    power = int(exponent)
    if -3 <= power < 6:
        rounded = float(f"{mantissa}e{power}")
        text = f"{rounded:,.{max(0, 2 - power)}f}"
        return sign + (_without_trailing_zeros(text) if rounded == abs(value) else text)
    return f"{sign}{_without_trailing_zeros(mantissa)}e{power}"


def _without_trailing_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: Number | None) -> str:
    """A share of 1 as a percentage with one decimal: 0.875 is 87.5%."""
    return MISSING if share is None else f"{share * 100:.1f}%"


def duration(seconds: Number | None) -> str:
    """Seconds in the two largest units that fit: 62 s, 4 min 10 s, 1 h 2 min, 3 d 4 h."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{number(round(seconds, 1) if seconds < 10 else round(seconds))} s"
    whole = round(seconds)
    for large, large_name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= large:
            return f"{whole // large} {large_name} {whole % large // small} {small_name}"
    return f"{whole // 60} min {whole % 60} s"


def size(num_bytes: Number | None) -> str:
    """Bytes in binary units: 11.2 GiB."""
    if num_bytes is None:
        return MISSING
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def magnitude(count: Number | None) -> str:
    """A large count in thousands, millions or billions: 135 million."""
    if count is None:
        return MISSING
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if abs(count) >= unit:
            return f"{number(count / unit)} {name}"
    return number(count)


def wilson_interval(share: Number, num_trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval around a share of `num_trials` independent trials; z = 1.96 makes it one of 95 %.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n): Eq. 4 of Brown, Cai and DasGupta 2001 ("Interval
    Estimation for a Binomial Proportion"), after Wilson 1927. Unlike p -+ z sqrt(p (1 - p)/n) it stays within [0, 1]
    and is honest for small n and for shares near 0 and 1.
    """
    if num_trials < 1:
        raise ValueError(f"num_trials: must be at least 1, got {num_trials}")
    share = min(max(share, 0.0), 1.0)
    shrink = 1 + z * z / num_trials
    middle = (share + z * z / (2 * num_trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / num_trials + (z / (2 * num_trials)) ** 2) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def roc_interval(area: Number, num_positive: int, num_negative: int, z: float = 1.959964) -> tuple[float, float] | None:
    """The interval around an area A under the ROC curve: A -+ z SE within [0, 1]; z = 1.96 makes it one of 95 %.

    SE^2 = (A (1 - A) + (n+ - 1)(Q1 - A^2) + (n- - 1)(Q2 - A^2)) / (n+ n-) with Q1 = A / (2 - A) and
    Q2 = 2 A^2 / (1 + A): Eqs. 1 and 2 of Hanley and McNeil 1982 ("The Meaning and Use of the Area under a Receiver
    Operating Characteristic (ROC) Curve", Radiology 143). The area is the share of the couples of a positive and a
    negative one in which the positive one is ahead; SE knows that the couples share their members.

    Returns:
        None without one of each class, and where A is 0 or 1: there SE is 0, a certainty that few examples do not give.
    """
    if min(num_positive, num_negative) < 1 or not 0 < area < 1:
        return None
    square = area * area
    of_positive = (num_positive - 1) * (area / (2 - area) - square)
    of_negative = (num_negative - 1) * (2 * square / (1 + area) - square)
    error = math.sqrt((area * (1 - area) + of_positive + of_negative) / (num_positive * num_negative))
    return max(0.0, area - z * error), min(1.0, area + z * error)
