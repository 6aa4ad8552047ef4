"""Speech language models on Mimi codec codes. README.md lists the packages and the suffixes of tensor names."""
