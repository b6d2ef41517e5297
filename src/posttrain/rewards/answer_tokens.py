"""Split an answer into numbers, words and symbols, with LaTeX, Markdown and Unicode written plainly."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 300
"""Characters of a number."""
_COMMANDS = {
    "times": "×", "cdot": "×", "ast": "×", "div": "÷", "pm": "±", "mp": "∓", "neq": "≠", "ne": "≠", "leq": "≤",
    "le": "≤", "leqslant": "≤", "geq": "≥", "ge": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "approx": "≈",
    "simeq": "≈", "sim": "≈", "cong": "≈", "to": "⇒", "rightarrow": "⇒", "Rightarrow": "⇒", "implies": "⇒",
    "Longrightarrow": "⇒", "longrightarrow": "⇒", "therefore": "⇒", "circ": "°", "degree": "°", "pounds": "£",
    "euro": "€", "textdollar": "$", "infty": "∞", "pi": "π", "ldots": "…", "dots": "…", "lbrace": "(", "rbrace": ")",
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "frac": "\\frac", "quad": " ", "qquad": " ", "left": "",
    "right": "", "displaystyle": " ", "textstyle": " ", "big": "", "Big": "", "bigl": "", "bigr": "", "boxed": "",
}  # fmt: skip
_TYPESETTING = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|mathsf|mathbb|boldsymbol|bm|operatorname|"
    r"underline|emph)\s*\{([^{}]*)\}"
)
_SYMBOLS = {"·": "×", "*": "×", "∗": "×", "⋅": "×", "→": "⇒"}
_DASHES = str.maketrans(dict.fromkeys("−–—‐‑﹣－", "-") | dict.fromkeys("\u00a0\u2009\u202f\u2007\u200a", " "))
_SUPERSCRIPT = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_PLAIN = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?![0-9])(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![\w.]))?"
    r"|(?P<word>[^\W\d_¼-¾⅐-⅞]+(?:['’][^\W\d_]+)*)|(?P<command>\\[A-Za-z]+)|(?P<space>\s+)|(?P<symbol>\\?.)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A number, word or symbol.

    Attributes:
        text: As written; LaTeX's commands by the symbol that they stand for.
        kind: number, vulgar (½), word, symbol, or bad (a number that is none, as 1.2.3).
        glued: True if nothing stands between it and the token before.
        value: Of a number.
    """

    text: str
    kind: str
    glued: bool
    value: Fraction | None = None


def plain_typesetting(text: str) -> str:
    r"""Return text with dashes, spaces, superscripts and LaTeX's \text{…} written plainly."""
    text = text.translate(_DASHES).replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\[,;: ]|~", " ", text)
    for _ in range(3):
        text = _TYPESETTING.sub(lambda m: f" {m[1]} " if re.search(r"[A-Za-z]", m[1]) else m[1], text)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_PLAIN) + "}", text)
    text = re.sub(r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?", "°", text)
    text = re.sub(r"\^\s*\{?\s*(st|nd|rd|th)\b\s*\}?", r"\1", text)
    return re.sub(r"[-=]+>", "⇒", text).rstrip().rstrip("\\")


def _unmarked_emphasis(text: str) -> str:
    """Return text without Markdown's stars, underscores, backticks and quotes."""
    text = re.sub(r"(?<=[0-9])\*\*(?=[-0-9{(])", "^", text)
    text = re.sub(r"\*\*|__|`|[“”\"]", "", text)
    text = re.sub(r"(?<![\w.])['‘]([^'‘’]*)['’](?!\w)", r"\1", text)
    text = re.sub(r"(?:(?<=\s)|^)[*_](?=\S)|(?<=\S)[*_](?=\s|[.,;:!?]|$)", "", text)
    return re.sub(r"<<[^<>]*>>", "", text)  # a calculator's note, as in GSM8K


def answer_tokens(text: str, marked: bool) -> list[AnswerToken]:
    """Return the tokens of an answer; a line without a mark may begin with the sign of a list."""
    text = _unmarked_emphasis(plain_typesetting(text))
    if not marked:
        text = re.sub(r"^\s*(?:[-*+•]|#+)\s+(?=.*[A-Za-z])", "", text)  # of a list or a heading
    out: list[AnswerToken] = []
    end_of_last = -1
    for match in _TOKEN.finditer(text):
        if match["space"]:
            continue
        glued, token = match.start() == end_of_last, match.group()
        # Dollars, or the bounds of mathematics, are neutral: -$42 is a number with its sign, and has $42 two words.
        if token not in ("$", "\\$", "\\(", "\\)", "\\[", "\\]") or (glued and out and out[-1].text in ("-", "+")):
            end_of_last = match.end()
        if match["number"]:
            out.append(_number_token(match, glued, text, out))
        elif match["word"]:
            out.append(AnswerToken(token, "word", glued))
        elif match["command"]:
            symbol = _COMMANDS.get(token[1:], token)
            if symbol.strip():
                out.append(AnswerToken(symbol, "symbol", glued))
        elif token in ("\\%", "\\$", "\\{", "\\}", "\\[", "\\]", "\\(", "\\)"):
            if token == "\\%":
                out.append(AnswerToken("%", "symbol", glued))
            elif token[1] in "{}":
                out.append(AnswerToken("\\" + token[1], "symbol", glued))
        elif len(token) == 1 and unicodedata.category(token) == "No" and "⁄" in unicodedata.normalize("NFKC", token):
            top, _, under = unicodedata.normalize("NFKC", token).partition("⁄")
            out.append(AnswerToken(token, "vulgar", glued, Fraction(int(top), int(under))))
        elif token == "!" and text[match.end() : match.end() + 1] in ("$", "\\"):  # in mathematics it is no exclamation
            out.append(AnswerToken("factorial", "symbol", glued))
        elif token == "$" or (token != "°" and unicodedata.category(token[-1]) in ("So", "Cf", "Mn", "Me")):
            continue
        else:
            out.append(AnswerToken(_SYMBOLS.get(token, token), "symbol", glued))
    return out


def _number_token(match: re.Match[str], glued: bool, text: str, before: list[AnswerToken]) -> AnswerToken:
    digits = match["number"].replace(",", "").replace(" ", "")
    after = text[match.end() : match.end() + 2]
    name = glued and before and before[-1].kind in ("word", "number", "bad")  # x42, 1.2.42
    if name or len(match.group()) > _LONGEST or re.match(r"\.?[0-9]", after):
        return AnswerToken(match.group(), "bad", glued)
    value = Fraction(digits + (match["exponent"] or ""))
    return AnswerToken(match.group(), "number", glued, value)
