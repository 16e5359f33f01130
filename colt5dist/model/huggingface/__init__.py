"""The file that transformers needs to open an exported model: it is copied, and only transformers runs it."""
