"""UniWorld-V1: one model that understands, generates, edits and perceives images.

Importing this package is cheap; torch is loaded by `uniworld.engine`, `uniworld.models` and `uniworld.kernels`.
"""

from pathlib import Path

from uniworld.version import __version__

# `engine/` and `kernels/` stand beside this folder in a checkout. Extending the search path makes a checkout
# importable as it is: uninstalled, or shadowing an installed copy when python starts at its root.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "registry.py").is_file():
    __path__.append(str(_checkout))

__all__ = ["__version__"]
