"""trtpass: a compiler pass that brings token-sparse attention and its kin into ONNX Runtime and TensorRT engines."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Components", "scc"]

if TYPE_CHECKING:
    from trtpass.components import Components, scc


def __getattr__(name: str) -> Any:
    """What is exported is loaded when it is first used: the command line starts without NumPy."""
    if name in __all__:
        from trtpass import components

        return getattr(components, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
