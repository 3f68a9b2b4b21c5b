"""Quality of a token-selecting engine, dense against rewritten: numbers, never a pass or a fail (docs/quality.md).

``measure`` runs the checks and writes the folder ``quality/`` of an engine; ``render`` makes tables of its result.
"""

from trtpass.quality.measure import measure
from trtpass.quality.tables import render

__all__ = ["measure", "render"]
