"""KVzap (arXiv 2601.07891): which keys a model will look at again. No pass uses it yet; the oracle is here."""
