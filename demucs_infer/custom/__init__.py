"""Custom networks: describe, register, build and load networks from other packages."""
