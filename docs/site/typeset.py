"""Docstrings as HTML: formulas that are written in plain text get their indices, powers and signs. Nothing is fetched
to show them, and what is copied from a page still reads as it does in the source."""

import html
import re

# What may carry an index besides names of one or two letters; longer words with an underscore are names of options.
_INDEXED = "out|sum|softmax|mean|concat|argmax|slope|token|layer|lambda|sigma|theta|psi|phi|mu"
_GREEK = "lambda|sigma|theta|psi|phi|mu|nu|tau|pi"  # as HTML calls them, too
_SIGNS = {"&lt;-": "←", "&lt;=": "≤", "&gt;=": "≥", " . ": " · ", " - ": " \N{MINUS SIGN} ", "-&gt;": "→"}
_INSIDE = r"\((?:[^()]|\([^()]*\))*\)"  # brackets, and brackets in them


def formula(text: str) -> str:
    """Plain text as HTML: x_t, x^2, sum_s, sqrt(H), phi and <= as they are printed."""
    text = html.escape(text, quote=False)
    for plain, sign in _SIGNS.items():
        text = text.replace(plain, sign)
    mark = lambda tag: lambda match: f"{match[1]}<{tag}>{_bare(match[2])}</{tag}>"
    index, power = rf"({_INSIDE}|[A-Za-z0-9]+)", rf"({_INSIDE}|[A-Za-z0-9+]+|-1)"
    text = re.sub(rf"((?<![\w`])(?:{_INDEXED}|[A-Za-z]{{1,2}}\d?'?)|[)\]|])_{index}", mark("sub"), text)
    text = re.sub(rf"(\S)\^{power}", mark("sup"), text)
    text = re.sub(r"\bsum(?=<sub>)", "∑", text)
    text = re.sub(r"\bsqrt(?=\()", "√", text)
    return re.sub(rf"\b({_GREEK})\b(?!=)", r"&\1;", text)


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith("(") else text


def inline(text: str) -> str:
    """A line of prose as HTML: code between backticks, papers by their number as links, the rest as formulas."""
    parts = []
    for part in re.split(r"(`[^`]+`|arXiv \d{4}\.\d{4,5})", text):
        if part.startswith("`"):
            parts.append(f"<code>{html.escape(part[1:-1], quote=False)}</code>")
        elif part.startswith("arXiv "):
            parts.append(f'<a href="https://arxiv.org/abs/{part[6:]}">{part}</a>')
        else:
            parts.append(formula(part))
    return "".join(parts)


def paragraph(text: str) -> str:
    """A paragraph of a docstring: one that is indented keeps its lines, as those of a formula do; a list of sentences
    too, in which an indented line goes on with the one before."""
    indented = text.startswith("  ")
    lines = text.split("\n") if indented else re.sub(r"\n {2,}", " ", text).split("\n")
    if indented:
        return f'<p class="equation lines">{inline(text)}</p>'
    if len(lines) > 1 and all(line.endswith(".") for line in lines):
        return f"<p>{'<br>'.join(map(inline, lines))}</p>"
    words = " ".join(lines)
    shown = ' class="equation"' if _is_formula(words) else ""
    return f"<p{shown}>{inline(words)}</p>"


def _is_formula(text: str) -> bool:
    """Whether a paragraph says above all how something is computed: it begins with an equation."""
    return re.match(r"[^.,]{1,40} (=|<-) |Head n: out|score [-+] |x_t \+ ", text) is not None


def docstring(text: str) -> str:
    """A docstring as HTML without its options, which are a table of their own."""
    kept = text.partition("Options:")[0].rstrip()
    return "\n\n".join(paragraph(each) for each in kept.split("\n\n") if each.strip())


def cell(text: str) -> str:
    """What a cell of a Markdown table holds, as HTML."""
    return inline(text).replace("|", "&#124;")
