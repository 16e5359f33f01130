"""The files that users give, as documents of text."""
