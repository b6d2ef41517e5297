"""Sums that a model wrote, worked out exactly: never run as code, and never large."""

from __future__ import annotations

import ast
import re
import warnings
from fractions import Fraction

MAX_CHARACTERS = 200
"""Characters of an expression."""
BITS = 512
"""Of a number's numerator or denominator, in between too: about 150 digits."""
POWER = 256
"""Largest exponent."""
DIGITS = 12
"""Digits behind the point (or, of a very small number, digits that count) that `written` gives what has more."""

_ALLOWED = re.compile(r"[0-9eE.+\-*/%() \t]*")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_SIGNS = str.maketrans(dict(zip("×·÷−–{}[]", "**/--()()", strict=True)))


class NotArithmetic(ValueError):
    """Report an expression that can't be evaluated; the message says why, for the model to read."""


def evaluate(text: str) -> Fraction:
    """Compute the exact value of an expression: + - * / // % ** (also ^ × · ÷ −), brackets, decimals, 1,234 and 1e3.

    Names, calls, comparisons and everything else are refused, as are expressions of over 200 characters, exponents
    over 256 or that are not whole numbers, and numbers of over about 150 digits, in intermediate results too. 0.1 is
    one tenth. Raises NotArithmetic.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotArithmetic(f"longer than {MAX_CHARACTERS} characters")
    plain = text.strip().translate(_SIGNS).replace("^", "**")
    plain = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), plain)
    if not plain:
        raise NotArithmetic("nothing to work out")
    if not _ALLOWED.fullmatch(plain):
        raise NotArithmetic(f"not arithmetic: {text.strip()[:40]}")
    # Leading zeros, which are no Python, go: 007 is 7.
    plain = re.sub(r"(?<![0-9.eE])0+(?=[0-9])", "", plain)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(plain, mode="eval")
        return _value(tree.body, plain)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, NotArithmetic):
            raise
        raise NotArithmetic(f"not arithmetic: {text.strip()[:40]}") from error


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        literal = text[node.col_offset : node.end_col_offset]  # ASCII alone: bytes are characters
        if not _NUMBER.fullmatch(literal):
            raise NotArithmetic(f"not a number: {literal[:40]}")
        return _bounded(Fraction(literal))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _bounded(_apply(node.op, _value(node.left, text), _value(node.right, text)))
    raise NotArithmetic("not arithmetic")


def _apply(op: ast.operator, a: Fraction, b: Fraction) -> Fraction:
    if isinstance(op, ast.Add):
        return a + b
    if isinstance(op, ast.Sub):
        return a - b
    if isinstance(op, ast.Mult):
        return a * b
    if isinstance(op, ast.Pow):
        if b.denominator != 1 or abs(b) > POWER:
            raise NotArithmetic(f"exponents are whole numbers up to {POWER}")
        if not a and b < 0:
            raise NotArithmetic("division by zero")
        if max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(int(b)) > BITS + POWER:
            raise NotArithmetic("too large a number")
        return Fraction(a ** int(b))
    if isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
        if not b:
            raise NotArithmetic("division by zero")
        return a / b if isinstance(op, ast.Div) else Fraction(a // b) if isinstance(op, ast.FloorDiv) else a % b
    raise NotArithmetic("not arithmetic")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise NotArithmetic("too large a number")
    return value


def written(value: Fraction) -> str:
    """Write a number as people do: 25, -0.5; rounded to 12 places if it has more: 0.333333333333."""
    if value.denominator == 1:
        return str(value.numerator)
    places = DIGITS
    if value and abs(value) < Fraction(1, 10):  # as many digits that count
        places += len(str(value.denominator // abs(value.numerator))) - 1
    scaled = round(abs(value) * 10**places)
    whole, rest = divmod(scaled, 10**places)
    digits = str(rest).zfill(places).rstrip("0")
    return ("-" if value < 0 and scaled else "") + str(whole) + ("." + digits if digits else "")
