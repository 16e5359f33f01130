"""Questions on Python source code, with answers that stand in it: pairs that need a long input to be read.

The input is a question, `What does shlex.split do?`, and a part of that module's source, which holds the function or
class with its docstring. The target is the first sentence of that docstring. Nothing else in the input names the place,
so the answer has to be found.
"""

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator

from colt5dist.data.inputs.pairs import Pair

INPUT_BYTES = 2047
"""Most bytes of an input: with an end token they are 2048 tokens."""
ANSWER_CHARACTERS = (12, 80)
"""Fewest and most characters of an answer."""
SENTENCE_END = re.compile(r"[.!?](\s|$)")

HEAD = re.compile(r"\b(?:def|class) (\w+)")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def questions(module: str, source: str) -> Iterator[Pair]:
    """Yield the pairs of a module, in the order of its source.

    A definition is asked for where its docstring begins with a sentence that is on one line, where its name is defined
    once in the part of the source that is shown, and where the answer stands there once.

    Args:
        module: its name.
        source: its source, of ASCII characters only: a character is a byte then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the source
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    for name, definition in _definitions(tree, ""):
        answer = _first_sentence(ast.get_docstring(definition, clean=True) or "")
        if answer is None:
            continue
        question = f"What does {module}.{name} do?\n\n"
        begin, docstring_end = line_starts[definition.lineno - 1], line_starts[definition.body[0].end_lineno or 0]
        shown = _shown(source, begin, docstring_end, INPUT_BYTES - len(question), question)
        if shown.count(answer) == 1 and HEAD.findall(shown).count(definition.name) == 1:
            yield Pair(question + shown, answer)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """(name in the module, definition) of functions, classes and methods; not of functions in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}{child.name}.")


def _first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring without its full stop, if it is on the first line and of a usual length.

    A line that introduces others is none.
    """
    line = docstring.split("\n", maxsplit=1)[0].strip()
    end = SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    ended = end is not None or docstring.strip() == line or docstring.startswith(line + "\n\n")
    ended = ended and not sentence.endswith(":")
    return sentence if ended and ANSWER_CHARACTERS[0] <= len(sentence) <= ANSWER_CHARACTERS[1] else None


def _shown(source: str, begin: int, end: int, size: int, question: str) -> str:
    """Whole lines of the source around begin..end-1, at most `size` characters; a hash decides how many come before."""
    if len(source) <= size:
        return source
    room = size - (end - begin)
    if room < 0:
        return ""
    share = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "big") / 2**32
    first = min(max(0, begin - int(share * room)), len(source) - size)
    cut = source.find("\n", first, begin) + 1 if first else 0
    first = cut or (begin if first else 0)
    last = min(len(source), first + size)
    return source[first : last if last == len(source) else source.rfind("\n", end - 1, last) + 1]
