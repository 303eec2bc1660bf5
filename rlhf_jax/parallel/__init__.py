"""Meshes, and the two ways of running one pure step on many devices."""
