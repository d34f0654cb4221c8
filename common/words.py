"""Numbers as one would say them."""

from __future__ import annotations


def count_in_words(count: int) -> str:
    """A large number, for example "3.1 million"; below a hundred thousand all digits."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"


def rounded(value: float, digits: int = 2) -> str:
    """A number of so many digits, without exponents: "0.35", "160", "1,200"."""
    return f"{float(f'{value:.{digits}g}'):,.12g}"


def duration_in_words(seconds: float) -> str:
    """A time, for example "13 hours 50 minutes", no more exact than an estimate is; at least a minute."""
    minutes = max(1, round(seconds / 60))
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days >= 1:
        parts = [(days, "day"), (hours, "hour")]
    elif hours >= 1:
        parts = [(hours, "hour"), (rest // 10 * 10, "minute")]
    else:
        parts = [(minutes, "minute")]
    return " ".join(f"{number} {name}{'' if number == 1 else 's'}" for number, name in parts if number)


def counted(count: int, thing: str) -> str:
    """A number of things: "1 picture", "1,024 pictures"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
