"""Custom ops, one file an op. Import the op you need: `from uniworld.kernels.adaln_modulate import adaln_modulate`.

This file stays empty of imports: with a checkout's root on `sys.path`, transformers and diffusers probe for
another package called `kernels` and import this one.
"""
