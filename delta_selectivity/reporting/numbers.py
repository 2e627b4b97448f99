"""Format numbers with as many digits as their intervals support.

>>> number(-0.0472, "+.3f"), number(None, ".3f"), p_value(0.0)
('-0.047', '-', '< 1e-15')
"""

from __future__ import annotations

from delta_selectivity.records import result_file


def number(value: float | None, form: str) -> str:
    """Return the number in this format; a dash for None."""
    return "-" if value is None else format(value, form)


def interval(level: result_file.Json, score: str, form: str = "+.4f") -> str:
    """Return the 95 % interval of a score of `_run.sae_level`; a dash if there is none."""
    if level.get(f"{score}_ci_low") is None:
        return "-"
    return f"{level[f'{score}_ci_low']:{form}} .. {level[f'{score}_ci_high']:{form}}"


def p_value(p: float | None) -> str:
    """Return a p or q value as text. Values below 1e-15 say no more: they are of a normal distribution's far tail."""
    return "< 1e-15" if p is not None and p < 1e-15 else number(p, ".1e")


def typeset(text: str) -> str:
    """Return a number with a typographic minus; values that round to 0 have no sign.

    >>> typeset("-0.047"), typeset("-0.000")
    ('−0.047', '0.000')
    """
    return (
        text.lstrip("+-") if text[:1] in "+-" and text.strip("+-0.") == "" and text != "-" else text.replace("-", "−")
    )


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference, typeset."""
    return typeset(number(value, f"+.{digits}f"))


def probability(p: float | None) -> str:
    """Return a p or q value, typeset; in scientific notation below 0.001.

    >>> probability(0.0204), probability(3.1e-8)
    ('0.020', '3.1e−08')
    """
    return number(p, ".3f") if p is not None and p >= 0.001 else typeset(p_value(p))


def span(low: float | None, high: float | None, digits: int = 3) -> str:
    """Return an interval, typeset; a dash if there is none."""
    return "–" if low is None or high is None else f"{signed(low, digits)} to {signed(high, digits)}"


def unsigned_span(low: float | None, high: float | None) -> str:
    """Return an interval as `span` does, without signs."""
    return "–" if low is None or high is None else f"{typeset(f'{low:.3f}')} to {typeset(f'{high:.3f}')}"


def few_effective(record: result_file.Json) -> bool:
    """Return whether the effective number of people is below half their number because their numbers of rows differ."""
    effective = record.get("n_people_effective")  # absent in files older than version 0.5
    return effective is not None and effective < record["n_people"] / 2


def people(record: result_file.Json) -> str:
    """Return a cell's number of people, with the effective number if that is below half.

    >>> people({"n_people": 54, "n_people_effective": 6.21}), people({"n_people": 54, "n_people_effective": 40.0})
    ('54 (as 6.2)', '54')
    """
    effective = f" (as {record['n_people_effective']:.2g})" if few_effective(record) else ""
    return f"{record['n_people']}{effective}"


def fvu_whole(figures: result_file.Json) -> str:
    """Return `fvu_whole` of a layer, with its standard error if tokens were sampled, and its value without outliers.

    Files older than version 0.5 have neither of the two.

    >>> fvu_whole({"fvu_whole": 1.2312, "fvu_whole_se": 0.0021, "outliers": 0.034, "fvu_ordinary": 0.7604})
    '1.231 ± 0.0021 (0.760 without 3.4 % outliers)'
    """
    error, share = figures.get("fvu_whole_se"), figures.get("outliers")
    shown = number(figures.get("fvu_whole"), ".3f")
    if error:
        shown += f" ± {error:.2g}"
    if share and figures.get("fvu_ordinary") is not None:
        shown += f" ({figures['fvu_ordinary']:.3f} without {100 * share:.2g} % outliers)"
    return shown
