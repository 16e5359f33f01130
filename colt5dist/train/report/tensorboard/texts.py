"""Plain text as Markdown that shows it unchanged."""


def code_block(text: str) -> str:
    """A block of code. Indented, not fenced: so no line of the text can end it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def literal(text: str, *, space: str = " ") -> str:
    """Text in one line, also within a table: no character of it has a meaning in Markdown or HTML.

    Args:
        text: the text; line breaks and tabs are shown by signs.
        space: what is written for a space.
    """
    shown = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥").replace(" ", space)
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in shown)
