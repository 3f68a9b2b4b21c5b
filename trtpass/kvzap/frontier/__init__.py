"""The quality frontier: what each KV policy keeps of a model's quality at each fraction of keys removed.

PyTorch alone: one dense prefill a prompt, the policies as masks on its keys, then questions over what is left.
"""

from trtpass.kvzap.frontier.run import frontier

__all__ = ["frontier"]
