"""The one place that says which numbatch this is (`pyproject.toml` reads it from here)."""

VERSION = "0.1.0"
