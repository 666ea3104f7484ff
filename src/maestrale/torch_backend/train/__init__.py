"""Training, from scratch or from a model: text or samples in, a native model folder or an adapter out."""
