"""Training a small model from scratch on a CPU: text files in, a native model folder out."""
