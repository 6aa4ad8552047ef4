"""Between codes and token ids: the vocabulary, and a clip as a sequence."""
