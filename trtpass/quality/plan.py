"""How much is measured: lengths, samples, settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trtpass.errors import InputError


@dataclass(frozen=True)
class Plan:
    """What one run measures. Lengths are in tokens.

    Args:
        coverages: the sweep; the engine's own coverage is added. 0 is the identity: run once and compared with dense.
        passkey: ``(prompt length, prompts)``: keys and depths differ between the prompts of a length.
        documents: ``(context length, documents)`` of the continuation task.
        continuation: tokens scored after a context.
        bound_tokens: length of the prompt on which the local error bound is measured.
        compare: also measure the other ``select`` and the other ``mode`` at the engine's own coverage, on all but the
            longest lengths.
    """

    coverages: tuple[float, ...]
    passkey: tuple[tuple[int, int], ...]
    documents: tuple[tuple[int, int], ...]
    continuation: int = 200
    bound_tokens: int = 3072
    compare: bool = True

    def fit(self, context: int) -> Plan:
        """The plan without lengths that exceed a model's ``context``.

        Raises:
            InputError: nothing is left.
        """
        spare = self.continuation
        fitted = replace(
            self,
            passkey=tuple((length, n) for length, n in self.passkey if length + 16 <= context),
            documents=tuple((length, n) for length, n in self.documents if length + spare <= context),
            bound_tokens=min(self.bound_tokens, context),
        )
        if not fitted.documents:
            least = min(length for length, _ in self.documents) + spare
            raise InputError(f"a context of {context} tokens", f"at least {least}, the shortest quality check")
        return fitted

    def sweep(self, own: float) -> tuple[float, ...]:
        """All coverages above 0, ascending, the engine's own among them."""
        return tuple(sorted({c for c in (*self.coverages, own) if c > 0}))


FULL = Plan(
    coverages=(0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05),
    passkey=((1000, 2), (2000, 4), (4000, 3), (7000, 2)),
    documents=((2048, 4), (4096, 3), (7500, 2)),
)
SHORT = Plan(
    coverages=(0.02,),
    passkey=((1000, 1), (2000, 1)),
    documents=((2048, 2),),
    bound_tokens=1280,
    compare=False,
)


def spread(count: int, size: int) -> Sequence[int]:
    """``count`` numbers in ``[0, size)``, of which every first few are spread evenly too (golden-ratio steps)."""
    return [int(((i + 1) * 0.6180339887498949 % 1.0) * size) for i in range(count)]
