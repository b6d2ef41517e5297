"""Find the program in a completion."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from posttrain.data.think_marks import after_thinking

_PYTHON = re.compile(r"[{.\s]*i?py(?:thon)?[0-9.]*(?![\w-])", re.IGNORECASE)
_PYTHON_ALONE = re.compile(r"i?py(?:thon)?[0-9.]*", re.IGNORECASE)
_MARKDOWN = re.compile(r"[{.\s]*(?:markdown|md|mdx)\b", re.IGNORECASE)
_NO_LANGUAGE = {"", "code", "text", "txt", "plain", "plaintext", "none"}
_LINE_START = re.compile(r"[\s>]*(?:(?:[-*+]|[0-9]{1,9}[.)])\s+)?")
_INLINE = re.compile(r"`{1,3}(?:(?:python|py)\s+)?([^`]+)`{1,3}")
_DEFINED = re.compile(
    r"^(?:async[ \t]+)?(?:def|class)[ \t]+(?P<name>\w+)|^(?P<variable>\w+)[ \t]*(?::[^=\n]+)?=(?!=)"
    r"|^import[ \t]+(?P<modules>.+)|^from[ \t]+\S+[ \t]+import[ \t]+(?P<imported>.+)",
    re.MULTILINE,
)
_PRINTS = re.compile(r"\bprint[ \t]*\(|\bwrite[ \t]*\(|^def solution[ \t]*\(", re.MULTILINE)
_STATEMENT = re.compile(r"^[ \t]*(?:(?:async|def|class|import|from|for|while|if|with|try|return)\b|@\w)", re.MULTILINE)
_WORD = re.compile(r"[^\W\d]\w*")
_TOKEN = re.compile(r"#.*|\"\"\"|'''|\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?|[^#\"']+")


@dataclass(frozen=True, slots=True)
class Fence:
    """An opening fence.

    Attributes:
        before: What its line has before it.
        mark: Its characters.
        info: What follows it.
    """

    before: str
    mark: str
    info: str


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A fenced block.

    Attributes:
        text: Its content, without the fence's indentation.
        info: The words after the opening fence.
    """

    text: str
    info: str

    @property
    def is_python(self) -> bool:
        """Return True if it is marked as Python."""
        return bool(_PYTHON.match(self.info))

    @property
    def prints(self) -> bool:
        """Return True if it prints, or defines solution()."""
        return bool(_PRINTS.search(self.text))

    @property
    def is_code(self) -> bool:
        """Return True if it looks like a program, and not like the output of one."""
        return self.prints or bool(_STATEMENT.search(self.text))


def code_in(text: str, names: Collection[str] = (), prints: bool = False) -> str | None:
    """Return the program in a completion; None if there is none.

    Of fenced blocks (backticks or tildes, indented, in a quotation or a list, with any words after "python") those
    marked as Python count; if none is, those without a language. The last one is the program, or the last one that
    defines one of `names`: a block after it shows how it is used, or its output. Blocks that define what the program
    uses and does not define go before it. A block that is cut off reaches to the end. Without fences the program is the
    content of <answer>, [PYTHON] or <code>, or the whole text. What a model thinks does not count.

    Args:
        text: The completion.
        names: Names of which the program defines at least one, if it is tested by name.
        prints: True if the program has to print: blocks that print come before others.
    """
    said = after_thinking(text.replace("\ufeff", ""))
    if said is None:
        return None
    text = said
    blocks = [b for b in fenced_blocks(text) if b.text.strip()]
    if "```" not in text and "~~~" not in text or not blocks and _INLINE.fullmatch(text.strip()):
        for tag in (("<answer>", "</answer>"), ("[PYTHON]", "[/PYTHON]"), ("<code>", "</code>")):
            text = _between(text, *tag)
        inline = _INLINE.fullmatch(text.strip())
        text = inline[1] if inline else text
        return text if text.strip() else None
    programs = [b for b in blocks if b.is_python] or [b for b in blocks if b.info.lower() in _NO_LANGUAGE]
    return _joined(programs, set(names), prints) if programs else None


def _between(text: str, opening: str, closing: str) -> str:
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end] if start >= 0 else text


def fenced_blocks(text: str, strings: bool = True) -> Iterator[CodeBlock]:
    """Yield the fenced blocks of a text, in order; those inside a block of Markdown too.

    A fence in a string in triple quotes is a part of its block, unless `strings` is false or the string never ends.
    """
    opened: Fence | None = None
    lines: list[str] = []
    raw = text.split("\n")
    begin = 0
    quote: str | None = None  # of the string in triple quotes that the line begins in
    for place, line in enumerate(raw):
        fence = None if quote else _fence(line)
        if opened is None:
            opened, lines, begin = fence, [], place
            continue
        if fence is not None and _PYTHON.match(fence.info) and not fence.before.strip(" \t>"):
            yield from _block([*lines, ""], opened.info)  # it was not closed
            opened, lines, begin = fence, [], place
            continue
        content = _without_margin(line, opened.before)
        last = content.rstrip(" \t\r")
        code = last.rstrip(opened.mark[0])
        alone = not code.strip()
        closes = len(last) - len(code) >= len(opened.mark) and (len(code) <= 3 if alone else "#" not in code)
        if closes and (not strings or _quote_after(code, quote) is None):
            yield from _block([*lines, ""] if alone else [*lines, code, ""], opened.info)
            opened, quote = None, None
        else:
            lines.append(content)
            quote = _quote_after(content, quote) if strings else None
    if opened is not None and quote:
        yield from fenced_blocks("\n".join(raw[begin:]), strings=False)
    elif opened is not None:
        yield from _block(lines, opened.info)


def _block(lines: list[str], info: str) -> Iterator[CodeBlock]:
    text = "\n".join(lines)
    if _MARKDOWN.match(info):
        yield from fenced_blocks(text)
    else:
        yield CodeBlock(text, info)


def _fence(line: str) -> Fence | None:
    """Return the fence that a line opens a block with: at its beginning, or after words if it is marked as Python."""
    places = [p for p in (line.find("```"), line.find("~~~")) if p >= 0]
    if not places:
        return None
    before, rest = line[: min(places)], line[min(places) :]
    info = rest.lstrip(rest[0])
    mark, info = rest[: len(rest) - len(info)], info.strip()
    if mark[0] == "`" and "`" in info:
        return None
    if _LINE_START.fullmatch(before) or ("`" not in before and _PYTHON_ALONE.fullmatch(info)):
        return Fence(before, mark, info)
    return None


def _without_margin(line: str, before: str) -> str:
    """Return a line without the quotation marks and the indentation that its block's fence has."""
    if not _LINE_START.fullmatch(before):
        return line
    for _ in range(before.count(">")):
        head, mark, rest = line.partition(">")
        line = rest.removeprefix(" ") if mark and not head.strip() else line
    margin = before.rpartition(">")[2]
    indent = len(margin) - (1 if ">" in before and margin.startswith(" ") else 0)
    while indent and line[:1] in (" ", "\t"):
        line, indent = line[1:], indent - 1
    return line


def _quote_after(line: str, quote: str | None) -> str | None:
    """Return the triple quotes of the string that is still open after a line of Python; None if there is none.

    Args:
        line: The line.
        quote: Those that are open before it.
    """
    place = 0
    while True:
        if quote:
            place = line.find(quote, place)
            if place < 0:
                return quote
            place, quote = place + 3, None
        token = _TOKEN.match(line, place)
        if token is None:
            return None
        place = token.end()
        if token.group() in ('"""', "'''"):
            quote = token.group()


def _names_of(block: str, variables: bool = True) -> set[str]:
    """Return the names that a block defines at its top level."""
    out: set[str] = set()
    for match in _DEFINED.finditer(block):
        if match["name"]:
            out.add(match["name"])
        elif match["variable"]:
            out |= {match["variable"]} if variables else set()
        else:
            for part in (match["modules"] or match["imported"]).strip("() \t\r").split(","):
                words = _WORD.findall(part)
                out |= set(words[-1:] if " as " in part else words[:1])
    return out


def _chosen(blocks: list[CodeBlock], names: set[str], prints: bool) -> int:
    """Return the place of the block that counts."""
    found: list[int] = []
    for variables in (False, True):  # functions and classes before variables
        found = found or [i for i, b in enumerate(blocks) if names & _names_of(b.text, variables)]
    if not found and names:  # the body of a function alone
        found = [i for i, b in enumerate(blocks) if b.text.lstrip("\r\n")[:1] in (" ", "\t")]
    if not found and prints:
        found = [i for i, b in enumerate(blocks) if b.prints]
    if not found and not blocks[-1].is_python:
        found = [i for i, b in enumerate(blocks) if b.is_code]
    return found[-1] if found else len(blocks) - 1


def _joined(blocks: list[CodeBlock], names: set[str], prints: bool) -> str:
    """Return the block that counts, with those that define what it uses."""
    chosen = _chosen(blocks, names, prints)
    text = blocks[chosen].text
    taken, missing = {chosen}, set(_WORD.findall(text)) - _names_of(text)
    for i in reversed([i for i in range(len(blocks)) if i != chosen]):
        given = _names_of(blocks[i].text, variables=i < chosen)
        if given & missing:
            taken.add(i)
            missing = (missing | set(_WORD.findall(blocks[i].text))) - given
    return "\n".join(blocks[i].text for i in sorted(taken))


def names_called(tests: str, entry_point: str) -> set[str]:
    """Return the names by which tests may call a program: of the entry point, or all that they use.

    Args:
        tests: Source of the tests.
        entry_point: Expression that they call, such as ``add`` or ``Solution().add``. Empty: none.
    """
    own = set(re.findall(r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", tests, re.MULTILINE))
    return set(_WORD.findall(entry_point)) or set(_WORD.findall(tests)) - own
