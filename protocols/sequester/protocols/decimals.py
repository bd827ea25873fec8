"""Decimal numbers with one spelling, so that a signed text has one form."""

from __future__ import annotations

from decimal import Decimal


def exact_decimal(value: object) -> Decimal:
    """A finite decimal from text or an integer; a binary float is refused, its digits are not what was written."""
    if isinstance(value, bool | float) or not isinstance(value, str | int | Decimal):
        raise ValueError(f"{value!r} is not a decimal number; write it in quotes")
    try:
        number = Decimal(value)
    except ArithmeticError:
        raise ValueError(f"{value!r} is not a decimal number") from None
    if not number.is_finite():
        raise ValueError(f"{value!r} is not finite")
    if abs(number.adjusted()) > 30 or len(number.as_tuple().digits) > 60:
        # 1e999999999 is ten characters here and a gigabyte of zeros in the signed text
        raise ValueError(f"{str(value)[:40]!r} has too many digits")
    return number


def one_spelling(number: Decimal) -> str:
    """Plain notation without trailing zeros.

    >>> one_spelling(Decimal("1E-6")), one_spelling(Decimal("3.0"))
    ('0.000001', '3')
    """
    text = format(number.normalize(), "f")
    return "0" if text == "-0" else text
