"""Text and token ids: tokenizers, chat templates, and decoding a stream of tokens."""
