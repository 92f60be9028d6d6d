"""Tests run on the CPU, whatever the machine has, and import the packages of this checkout."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
