"""From any recording to mono samples, and between samples and Mimi's codes."""
