"""skylapse: text-to-video diffusion transformers, from a prompt to an mp4."""

from typing import TYPE_CHECKING, Any

from .runtime.core import openmp as _openmp

_openmp.prepare()  # before torch is imported
__version__ = "0.1.0"
__all__ = ["Engine", "Video", "VideoRequest", "__version__"]

if TYPE_CHECKING:
    from .runtime.core.request import Video, VideoRequest
    from .runtime.engine.engine import Engine


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562): `import skylapse` takes milliseconds, torch takes seconds."""
    if name == "Engine":
        from .runtime.engine.engine import Engine

        return Engine
    if name in ("Video", "VideoRequest"):
        from .runtime.core import request

        return getattr(request, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
