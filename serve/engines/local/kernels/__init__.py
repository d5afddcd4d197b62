"""The local engine's own kernels for CPUs: kernels.cpp, compiled where they run."""

from serve.engines.local.kernels.build import load

__all__ = ["load"]
